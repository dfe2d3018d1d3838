"""What a streamed answer is made of, byte for byte, whichever server sends it."""

from __future__ import annotations

import asyncio

import pytest
from both_servers import SERVERS

from dynamo_core.frontend.servers.contract import HttpServer


class Site:
    """An application of a few paths on a real socket."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        async def start(*headers) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": list(headers)})

        async def body(data: bytes, more: bool) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        match scope["path"]:
            case "/stream":
                await start()
                for n in range(200):
                    await body(b"event %d\n" % n, True)
                    if n % 7 == 0:
                        await asyncio.sleep(0)
                await body(b"end", False)
            case "/length":
                await start((b"content-length", b"6"))
                await body(b"abc", True)
                await body(b"def", False)
            case "/empty":
                await start()
                await body(b"", True)
                await body(b"", False)
            case "/late":
                await start()
                await self.gate.wait()
                await body(b"late", False)
            case "/large":
                await start()
                for _ in range(1024):
                    await body(b"x" * 65536, True)
                self.gate.set()
                await body(b"", False)


async def _answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length: " in head:
        return head, await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    body = bytearray()
    while (size := int(await reader.readline(), 16)) > 0:
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    return head, bytes(body)


@pytest.fixture(params=SERVERS)
async def served(request):
    site, stop, port = Site(), asyncio.Event(), asyncio.get_running_loop().create_future()
    server: HttpServer = SERVERS[request.param]()
    task = asyncio.create_task(
        server.serve(site, host="127.0.0.1", port=0, tls=None, stop=stop, on_listening=port.set_result, drain_timeout=5.0)
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", await asyncio.wait_for(port, 20), limit=2**16)

    async def get(path: str, *, version: str = "1.1") -> None:
        writer.write(f"GET {path} HTTP/{version}\r\nhost: x\r\n\r\n".encode())

    yield site, get, reader
    writer.close()
    stop.set()
    await asyncio.wait_for(task, 20)


async def test_answers_of_one_connection_are_framed_each_in_its_way(served):
    _, get, reader = served
    async with asyncio.timeout(30):
        for _ in range(3):
            await get("/stream")
            head, body = await _answer(reader)
            assert head.startswith(b"http/1.1 200")
            assert b"transfer-encoding: chunked" in head
            assert body == b"".join(b"event %d\n" % n for n in range(200)) + b"end"
            await get("/length")
            assert (await _answer(reader))[1] == b"abcdef"
            await get("/empty")
            assert (await _answer(reader))[1] == b""


async def test_a_client_that_does_not_read_stops_the_application(served):
    site, get, reader = served
    await get("/large")
    await asyncio.sleep(0.5)
    assert not site.gate.is_set()
    async with asyncio.timeout(60):
        assert len((await _answer(reader))[1]) == 1024 * 65536
    assert site.gate.is_set()


async def test_http_1_0_clients_get_no_chunks(served):
    _, get, reader = served
    await get("/stream", version="1.0")
    async with asyncio.timeout(30):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body.endswith(b"event 199\nend")


async def test_the_head_does_not_wait_for_a_late_body_with_hypercorn():
    site, stop, port = Site(), asyncio.Event(), asyncio.get_running_loop().create_future()
    server = SERVERS["hypercorn"]()
    task = asyncio.create_task(server.serve(site, host="127.0.0.1", port=0, tls=None, stop=stop, on_listening=port.set_result, drain_timeout=5.0))
    reader, writer = await asyncio.open_connection("127.0.0.1", await asyncio.wait_for(port, 20))
    writer.write(b"GET /late HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(20):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        site.gate.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"
    writer.close()
    stop.set()
    await asyncio.wait_for(task, 20)
