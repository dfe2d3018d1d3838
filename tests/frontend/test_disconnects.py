"""Clients that leave, and clients that read slowly."""

from __future__ import annotations

import asyncio
import json
import socket

import h2.connection
import h2.events
import pytest
from fake_catalog import FakeCatalog, FakeModel
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.types import Delta

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}


async def _cancelled(site) -> str | None:
    async with asyncio.timeout(20):
        while not site.model.generations:
            await asyncio.sleep(0.005)
        await site.model.generations[-1].cancel_event.wait()
    await site.settled()
    return site.model.generations[-1].cancelled


async def test_leaving_in_mid_stream_cancels_the_generation(each):
    each.model.script = [Delta(text="a", token_ids=[1]), asyncio.Event()]
    async with each.client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        assert await anext(response.aiter_lines())
    assert await _cancelled(each) == "client disconnected"
    assert each.finished[-1]["status"] == 499
    assert each.value("disconnected_clients_total") == 1
    assert each.value("model_cancellation_total", endpoint="chat_completions", model="m", request_type="stream") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_leaving_before_the_first_token_cancels_the_generation(each, stream):
    each.model.script = [asyncio.Event()]
    asking = asyncio.create_task(each.client.post("/v1/chat/completions", json=BODY | {"stream": stream}))
    async with asyncio.timeout(20):
        while not each.model.generations:
            await asyncio.sleep(0.005)
    asking.cancel()
    assert await _cancelled(each) == "client disconnected"
    assert each.model.starts[0][2].cancelled


async def test_leaving_while_the_request_waits_for_a_worker_cancels_its_context(each):
    each.model.start_delay = 60.0
    asking = asyncio.create_task(each.client.post("/v1/chat/completions", json=BODY))
    async with asyncio.timeout(20):
        while not each.model.starts:
            await asyncio.sleep(0.005)
        asking.cancel()
        assert await each.model.starts[0][2].wait_cancelled() == "client disconnected"
    await each.settled()


async def test_leaving_cancels_every_prompt_of_a_completion(site):
    site.model.script = [Delta(text="a", token_ids=[1]), asyncio.Event()]
    async with site.client.stream("POST", "/v1/completions", json={"model": "m", "prompt": ["a", "b"], "stream": True}) as response:
        assert await anext(response.aiter_lines())
    await site.settled()
    assert [generation.cancelled for generation in site.model.generations] == ["client disconnected"] * 2


@pytest.mark.parametrize("http2", [False, True])
async def test_a_server_that_cancels_the_request_cancels_the_generation(http2):
    """The HTTP server may drop a request by cancelling its task instead of reporting a disconnect."""
    model = FakeModel("m", [Delta(text="a", token_ids=[1]), asyncio.Event()])
    app = create_app(Frontend(), FakeCatalog(model), metrics=HttpMetrics(CollectorRegistry()))
    sent: asyncio.Queue[dict] = asyncio.Queue()
    messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop(0)
        return await asyncio.Event().wait()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "http_version": "2" if http2 else "1.1"}
    task = asyncio.create_task(app(scope, receive, sent.put))
    async with asyncio.timeout(20):
        for _ in range(2):
            await sent.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.generations[0].cancelled
    assert app.in_progress == 0


async def test_resetting_one_http2_stream_cancels_its_generation_and_no_other(site):
    """Only hypercorn speaks HTTP/2."""
    site.model.script = [Delta(text="a", token_ids=[1]), asyncio.Event()]
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    head = [(":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", "x")]
    for stream_id in (1, 3):
        connection.send_headers(stream_id, head)
        connection.send_data(stream_id, json.dumps(BODY).encode(), end_stream=True)
    writer.write(connection.data_to_send())
    waiting = {1, 3}
    async with asyncio.timeout(20):
        while waiting:
            events = connection.receive_data(await reader.read(65536))
            waiting -= {event.stream_id for event in events if isinstance(event, h2.events.DataReceived)}
            writer.write(connection.data_to_send())
        connection.reset_stream(3)
        writer.write(connection.data_to_send())
        while not any(generation.cancelled for generation in site.model.generations):
            await asyncio.sleep(0.005)
    assert sorted(str(generation.cancelled) for generation in site.model.generations) == ["None", "client disconnected"]
    assert site.app.in_progress == 1
    writer.close()
    await site.settled()


async def test_a_reader_that_does_not_read_stops_the_generation_from_being_read(each):
    """Back-pressure: the unread part of a long stream stays with the worker, it does not pile up here."""
    total = 20_000
    each.model.script = [*(Delta(text="x" * 1000, token_ids=[1]) for _ in range(total)), Delta(finish_reason="stop")]
    sock = socket.create_connection(("127.0.0.1", each.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    raw = json.dumps(BODY).encode()
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
    before = -1
    async with asyncio.timeout(30):
        while not each.model.generations or each.model.generations[0].reads != before:
            before = each.model.generations[0].reads if each.model.generations else -1
            for _ in range(20):
                await loop.sock_recv(sock, 1)
                await asyncio.sleep(0.005)
    assert 0 < each.model.generations[0].reads < total / 2
    assert (await each.client.get("/live")).status_code == 200
    sock.close()
    await _cancelled(each)
