"""Strangers, limits and odd requests on the `http` plane's port."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from dynamo_core.context import Context
from dynamo_core.errors import BodyTooLarge, CannotConnect, ProtocolViolation, WorkerOverloaded
from dynamo_core.transport import frames
from dynamo_core.transport.contract import Item
from dynamo_core.transport.frames import Outputs
from dynamo_core.transport.http import HttpPlane
from dynamo_core.types import Output

GUARD = 20


async def handler(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
    if endpoint == "size":
        yield bytes(int(payload))
    yield Output([len(payload), context.priority])
    if endpoint == "hang":
        await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(plane: HttpPlane) -> AsyncIterator[str]:
    server = await plane.serve(handler, "127.0.0.1")
    try:
        yield server.address
    finally:
        await server.close()


async def raw(address: str, sent: bytes) -> bytes:
    """What comes back before the other side hangs up."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    try:
        async with asyncio.timeout(GUARD):
            return await reader.read()
    finally:
        writer.close()


async def test_garbage_is_answered_400_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(HttpPlane()) as address:
        with caplog.at_level(logging.WARNING, "dynamo_core"):
            assert (await raw(address, b"\xff\xfe garbage\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert [record.getMessage().startswith("dropped the caller at 127.0.0.1:") for record in caplog.records] == [True]


async def test_a_request_that_does_not_arrive_whole_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(HttpPlane(request_timeout=0.2)) as address:
        with caplog.at_level(logging.WARNING, "dynamo_core"):
            assert await raw(address, b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc") == b""
            assert await raw(address, b"") == b""
        assert ["did not arrive within" in record.getMessage() for record in caplog.records] == [True], "an idle connection is no news"


async def test_a_body_over_the_limit_fails_alone() -> None:
    async with serving(HttpPlane(max_frame_bytes=10_000)) as address:
        channel = await HttpPlane().connect(address)
        for size in (20_000, 5_000_000):
            with pytest.raises(BodyTooLarge, match="limit of 10000"):
                await channel.open("x", bytes(size), Context("big")).read()
        assert await channel.open("x", bytes(9000), Context("small")).read() == [Output([9000, 0])]
        await channel.close()


async def test_an_item_over_the_callers_limit_fails_its_stream_alone() -> None:
    async with serving(HttpPlane()) as address:
        channel = await HttpPlane(max_frame_bytes=10_000).connect(address)
        with pytest.raises(ProtocolViolation, match="over the limit of 10000"):
            await channel.open("size", b"20000", Context("big")).read()
        assert await channel.open("x", b"", Context("small")).read() == [Output([0, 0])]
        await channel.close()


async def test_one_stream_too_many_is_a_migratable_overload() -> None:
    async with serving(HttpPlane(max_streams=2)) as address:
        channel = await HttpPlane().connect(address)
        held = [channel.open("hang", b"", Context(str(i))) for i in range(2)]
        for stream in held:
            assert await stream.read()
        with pytest.raises(WorkerOverloaded):
            await channel.open("x", b"", Context("too many")).read()
        await channel.close()


async def test_any_http_client_can_call_and_malformed_context_counts_as_absent() -> None:
    async with serving(HttpPlane()) as address, httpx.AsyncClient(base_url=address) as client:
        response = await client.post("/x", content=b"abc", headers={"dynamo-priority": "nan", "dynamo-remaining": "soon"})
        first, *_ = [frames.to_client.decode(body) for body in frames.Splitter(10_000).feed(response.content)]
        assert isinstance(first, Outputs)
        assert first.outputs == [Output([3, 0])]
        assert (await client.put("/x")).status_code == 405
        assert (await client.get("/")).text == f"dynamo {frames.VERSION}"


async def test_connecting_to_something_else_says_what_it_is() -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nnginx")
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    with pytest.raises(CannotConnect, match="nginx"):
        await HttpPlane().connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()
