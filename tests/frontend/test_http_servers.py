"""What every HTTP server must do: listen, drain, encrypt."""

from __future__ import annotations

import asyncio
import ssl

import httpx
import pytest
from both_servers import SERVERS
from fake_catalog import FakeCatalog, FakeModel
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Frontend, Tls
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.frontend.servers.contract import HttpServer
from dynamo_core.testing.servers import Authority
from dynamo_core.types import Delta

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}


@pytest.mark.parametrize("server", SERVERS.values())
def test_each_server_keeps_the_contract(server):
    assert isinstance(server(), HttpServer)


async def test_a_drain_refuses_new_connections_and_lets_open_streams_end(each):
    gate = asyncio.Event()
    each.model.script = [Delta(text="a", token_ids=[1]), gate, Delta(text="b" * 500_000, token_ids=[1]), Delta(finish_reason="stop")]
    async with each.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = response.aiter_lines()
        await anext(lines)
        each.stop.set()
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", each.port)
                    writer.close()
                    await asyncio.sleep(0.01)
                except OSError:
                    break
        assert not each.task.done()
        gate.set()
        assert [line async for line in lines][-2] == "data: [DONE]"
    await asyncio.wait_for(each.task, 20)


async def test_a_stream_that_outlasts_the_drain_is_cut_and_its_generation_cancelled(run):
    async with run(drain_timeout=0.2) as site:
        site.model.script = [Delta(text="a", token_ids=[1]), asyncio.Event()]
        async with site.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
            site.stop.set()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in response.aiter_lines():
                    pass
        await asyncio.wait_for(site.task, 20)
        assert site.model.generations[0].cancelled


async def test_an_idle_server_stops_at_once_whatever_the_drain_timeout(run):
    async with run(drain_timeout=3600) as site:
        await site.chat()
        site.stop.set()
        await asyncio.wait_for(site.task, 20)


async def test_a_connection_is_gone_when_its_client_is(run):
    """And not only when the keep-alive timeout is: clients that connect anew for each request would fill the memory."""
    async with run() as site:
        before = len(asyncio.all_tasks())
        for _ in range(20):
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"http://127.0.0.1:{site.port}/live")).status_code == 200
        async with asyncio.timeout(20):
            while len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.01)


async def _serve(server, app, stop, port=0, **options):
    listening = asyncio.get_running_loop().create_future()
    options = {"tls": None, "drain_timeout": 1.0} | options
    task = asyncio.create_task(server.serve(app, host="127.0.0.1", port=port, stop=stop, on_listening=listening.set_result, **options))
    await asyncio.wait((task, listening), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    return task, listening.result()


@pytest.fixture
def app():
    return create_app(Frontend(), FakeCatalog(FakeModel("m")), metrics=HttpMetrics(CollectorRegistry()))


@pytest.mark.parametrize("server", SERVERS.values())
async def test_a_taken_port_is_an_error_that_names_it(server, app):
    stop = asyncio.Event()
    task, port = await _serve(server(), app, stop)
    with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
        await _serve(server(), app, asyncio.Event(), port=port)
    stop.set()
    await task


@pytest.mark.parametrize("server", SERVERS.values())
async def test_several_servers_share_a_port_when_asked(server, app):
    stop = asyncio.Event()
    one, port = await _serve(server(), app, stop, reuse_port=True)
    two, _ = await _serve(server(), app, stop, port=port, reuse_port=True)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{port}/live")).status_code == 200
    stop.set()
    await asyncio.gather(one, two)


@pytest.mark.parametrize(("server", "http2"), [*((server, False) for server in SERVERS.values()), (SERVERS["hypercorn"], True)])
async def test_tls_and_mutual_tls(server, http2, app, tmp_path):
    authority = Authority(tmp_path)
    trusting = ssl.create_default_context(cafile=str(authority.cert))
    known = ssl.create_default_context(cafile=str(authority.cert))
    known.load_cert_chain(*authority.issue("client"))
    certificate = authority.issue("server")
    for client_ca in (None, authority.cert):
        stop = asyncio.Event()
        task, port = await _serve(server(), app, stop, tls=Tls(*certificate, client_ca))
        url = f"https://localhost:{port}/live"
        async with httpx.AsyncClient(verify=known, http2=http2) as client:
            response = await client.get(url)
            assert (response.status_code, response.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1")
        async with httpx.AsyncClient(verify=trusting, http2=http2) as client:
            if client_ca is None:
                assert (await client.get(url)).status_code == 200
            else:
                with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                    await client.get(url)
        stop.set()
        await asyncio.wait_for(task, 20)
