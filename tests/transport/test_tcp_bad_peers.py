"""Peers that break the protocol or a limit are dropped with one log line that says why, and hurt nobody else."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from dynamo_core.context import Context
from dynamo_core.errors import BodyTooLarge, CannotConnect, Disconnected, EngineFailed, RequestError, WorkerOverloaded
from dynamo_core.transport import frames
from dynamo_core.transport.contract import Item
from dynamo_core.transport.frames import Cancel, Credit, Data, End, Failure, Hello, Open, Outputs, Ping, Splitter
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.types import Output

GUARD = 20


class Endpoint:
    def __init__(self) -> None:
        self.closed = 0
        self.asked = 0

    async def __call__(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        try:
            if endpoint == "flood":
                while True:
                    self.asked += 1
                    yield bytes(65536)
            if endpoint == "size":
                yield bytes(int(payload))
            if endpoint == "output":
                yield Output(list(range(int(payload))))
            yield Output([len(payload)])
            if endpoint == "hang":
                await asyncio.Event().wait()
        finally:
            self.closed += 1


class Stranger:
    """A peer that speaks the protocol by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, address: str) -> "Stranger":
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    def send(self, *sent: frames.Frame | bytes) -> None:
        for frame in sent:
            self.writer.write(frame if isinstance(frame, bytes) else frames.encode(frame))

    async def dropped(self) -> str:
        """The reason that the other side gives before it hangs up."""
        splitter, reason = Splitter(1 << 26), ""
        async with asyncio.timeout(GUARD):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(65536):
                    for body in splitter.feed(data):
                        frame = frames.to_client.decode(body)
                        if isinstance(frame, Failure) and frame.stream == 0:
                            reason = frame.message
        self.writer.close()
        return reason


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@contextlib.asynccontextmanager
async def serving(endpoint: Endpoint, plane: TcpPlane | None = None) -> AsyncIterator[str]:
    server = await (plane or TcpPlane()).serve(endpoint, "127.0.0.1")
    try:
        yield server.address
    finally:
        await server.close()


async def one_item(address: str, plane: TcpPlane | None = None, endpoint: str = "x", payload: bytes = b"") -> list[Item]:
    channel = await (plane or TcpPlane()).connect(address)
    try:
        stream = channel.open(endpoint, payload, Context("q"))
        got: list[Item] = []
        async with asyncio.timeout(GUARD):
            while items := await stream.read():
                got += items
        return got
    finally:
        await channel.close()


BAD: dict[str, tuple[list[frames.Frame | bytes], str]] = {
    "http": ([b"GET / HTTP/1.1\r\n\r\n"], "looks like HTTP"),
    "tls": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], "looks like TLS"),
    "no-hello": ([Ping()], "did not say hello first"),
    "someone-else": ([Hello(magic="redis")], "did not say hello first"),
    "newer": ([Hello(version=99)], "speaks version 99"),
    "hello-twice": ([Hello(), Hello()], "hello twice"),
    "not-msgpack": ([Hello(), b"\0\0\0\x04\xc1\xc1\xc1\xc1"], "does not decode"),
    "unknown-kind": ([Hello(), (2).to_bytes(4, "big") + msgspec.msgpack.encode([77])], "does not decode"),
    "not-utf8": ([Hello(), bytes(frames.encode(Open(1, "xyz", b"", "a"))).replace(b"xyz", b"\xff\xfe\xfd")], "does not decode"),
    "wrong-direction": ([Hello(), Outputs([1], [Output([1])])], "does not decode"),
    "oversize": ([Hello(), (2**31).to_bytes(4, "big")], "over the limit of"),
    "stream-again": ([Hello(), Open(5, "hang", b"", "a"), Open(5, "hang", b"", "b")], "opened stream 5 after stream 5"),
    "takes-credit-back": ([Hello(), Open(1, "hang", b"", "a"), Credit(1, -5, 0)], "credit"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_peer_is_told_why_and_logged_once_and_others_go_on(case: str, endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    sent, reason = BAD[case]
    async with serving(endpoint) as address:
        good = await TcpPlane().connect(address)
        stays = good.open("hang", b"", Context("stays"))
        assert await stays.read()
        stranger = await Stranger.to(address)
        with caplog.at_level(logging.WARNING, "dynamo_core"):
            stranger.send(*sent)
            assert reason in await stranger.dropped()
        assert [reason in record.getMessage() for record in caplog.records] == [True]
        other = good.open("x", b"", Context("other"))
        assert await other.read() == [Output([0])]
        assert not good.closed
        await good.close()


async def test_a_peer_that_never_finishes_its_hello_is_dropped(endpoint: Endpoint) -> None:
    async with serving(endpoint, TcpPlane(connect_timeout=0.2)) as address:
        stranger = await Stranger.to(address)
        stranger.send(bytes(frames.encode(Hello()))[:7])
        assert "did not say hello within" in await stranger.dropped()


async def test_frames_for_streams_that_are_over_are_ignored(endpoint: Endpoint) -> None:
    async with serving(endpoint) as address:
        stranger = await Stranger.to(address)
        stranger.send(Hello(), Open(1, "x", b"", "a"), Cancel(1), Cancel(1), Credit(1, 5, 5), Cancel(999), Ping(), b"\xff\xff\xff\xff")
        assert "over the limit" in await stranger.dropped(), "it should have come as far as the last frame"


async def test_one_stream_too_many_is_a_migratable_overload_and_the_next_one_after_an_end_is_served(endpoint: Endpoint) -> None:
    async with serving(endpoint, TcpPlane(max_streams=3)) as address:
        channel = await TcpPlane().connect(address)
        held = [channel.open("hang", b"", Context(str(i))) for i in range(3)]
        for stream in held:
            assert await stream.read()
        with pytest.raises(WorkerOverloaded) as caught:
            await channel.open("x", b"", Context("too many")).read()
        assert caught.value.migratable
        held[0].cancel()
        async with asyncio.timeout(GUARD):
            while endpoint.closed == 0:
                await asyncio.sleep(0.01)
        assert await channel.open("x", b"", Context("next")).read() == [Output([0])]
        await channel.close()


async def test_a_request_over_the_workers_limit_fails_alone_and_is_not_sent(endpoint: Endpoint) -> None:
    async with serving(endpoint, TcpPlane(max_frame_bytes=10_000)) as address:
        channel = await TcpPlane().connect(address)
        with pytest.raises(BodyTooLarge, match="at most 10000"):
            await channel.open("x", bytes(10_001), Context("big")).read()
        assert await channel.open("x", bytes(9000), Context("small")).read() == [Output([9000])]
        await channel.close()


@pytest.mark.parametrize("kind", ["size", "output"])
async def test_an_item_over_the_callers_limit_fails_its_stream_alone(kind: str, endpoint: Endpoint) -> None:
    plane = TcpPlane(max_frame_bytes=10_000)
    async with serving(endpoint) as address:
        channel = await plane.connect(address)
        with pytest.raises(EngineFailed, match="limit of 10000"):
            await channel.open(kind, b"20000", Context("big")).read()
        assert await channel.open("x", b"", Context("small")).read() == [Output([0])]
        await channel.close()


async def test_a_context_that_cannot_be_sent_fails_its_stream_alone(endpoint: Endpoint) -> None:
    async with serving(endpoint) as address:
        channel = await TcpPlane().connect(address)
        with pytest.raises(RequestError, match="cannot be sent"):
            await channel.open("x", b"", Context("q", session="\ud800")).read()
        assert await channel.open("x", b"", Context("q")).read() == [Output([0])]
        await channel.close()


async def test_a_caller_that_does_not_read_its_socket_stops_the_handlers(endpoint: Endpoint) -> None:
    async with serving(endpoint) as address:
        stranger = await Stranger.to(address)
        stranger.send(Hello(window_items=2**40, window_bytes=2**60), *(Open(i, "flood", b"", str(i)) for i in range(1, 9)))
        before = -1
        async with asyncio.timeout(GUARD):
            while before != endpoint.asked or before == 0:
                before = endpoint.asked
                await asyncio.sleep(0.3)
        assert endpoint.asked * 65536 < 32 * 2**20
        stranger.writer.transport.abort()
        async with asyncio.timeout(GUARD):
            while endpoint.closed < 8:
                await asyncio.sleep(0.01)


# ------------------------------------------------------------------ the caller's side


@contextlib.asynccontextmanager
async def impostor(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> AsyncIterator[str]:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer(reader, writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    yield f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize(("first", "reason"), [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "looks like HTTP"), (bytes(frames.encode(Hello(version=2))), "version 2"), (b"", "no answer within")])
async def test_connecting_to_something_else_says_what_it_is(first: bytes, reason: str) -> None:
    async with impostor(lambda _, writer: writer.write(first)) as address:
        with pytest.raises(CannotConnect, match=reason):
            await TcpPlane(connect_timeout=0.5).connect(address)


@pytest.mark.parametrize("answer", [Outputs([99], [Output([1])]), Outputs([1, 2], [Output([1])]), b"\xff\xff\xff\xff", b"\0\0\0\x01\xc1"])
async def test_a_worker_that_breaks_the_protocol_loses_its_streams_as_disconnected(answer: frames.Frame | bytes) -> None:
    bad = answer if isinstance(answer, bytes) else bytes(frames.encode(answer))
    async with impostor(lambda _, writer: writer.write(bytes(frames.encode(Hello())) + bad)) as address:
        channel = None
        try:
            channel = await TcpPlane().connect(address)
            with pytest.raises(Disconnected):
                await channel.open("x", b"", Context("a")).read()
        except CannotConnect:
            pass  # the garbage came with the hello
        finally:
            if channel:
                await channel.close()


async def test_late_frames_of_a_cancelled_stream_are_dropped() -> None:
    late = b"".join(map(frames.encode, (Hello(), Data(1, b"late"), End(1), Failure(1, "x", "y"))))

    async with impostor(lambda _, writer: writer.write(frames.encode(Hello()))) as address:
        channel = await TcpPlane().connect(address)
        stream = channel.open("x", b"", Context("a"))
        stream.cancel()
        channel.data_received(late[len(frames.encode(Hello())):])  # type: ignore[attr-defined]
        assert not channel.closed
        await channel.close()


async def test_opens_wait_while_the_worker_does_not_read_and_a_cancelled_one_is_never_sent() -> None:
    reading = asyncio.Event()
    seen: list[str] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames.encode(Hello()))
        await reading.wait()
        splitter = Splitter(1 << 26)
        while data := await reader.read(1 << 20):
            for body in splitter.feed(data):
                frame = frames.to_server.decode(body)
                if isinstance(frame, Open):
                    assert frame.payload == bytes(8 << 20)
                    seen.append(frame.request)
                    writer.write(frames.encode(End(frame.stream)))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    channel = await TcpPlane().connect(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    streams = []
    for i in range(6):
        streams.append(channel.open("x", bytes(8 << 20), Context(str(i))))
        await asyncio.sleep(0.02)
    streams[3].cancel()
    reading.set()
    async with asyncio.timeout(GUARD):
        for i in (0, 1, 2, 4, 5):
            assert await streams[i].read() == ()
    assert sorted(seen) == ["0", "1", "2", "4", "5"]
    await channel.close()
    server.close()
