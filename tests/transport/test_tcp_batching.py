"""What many streams yield in one loop turn travels in one frame. Frames are counted, not timed."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop

from dynamo_core.context import Context
from dynamo_core.transport.contract import Item
from dynamo_core.transport.frames import Data, End, Failure, Outputs
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tcp_client import TcpChannel
from dynamo_core.types import Output

STREAMS, STEPS = 64, 20


class SteppedEngine:
    """All its streams get their next token from the same step, as those of a real engine do."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []
        self.complete = asyncio.Event()
        """All streams wait for the next step."""

    async def __call__(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        for i in range(STEPS):
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            if len(self.waiting) == STREAMS:
                self.complete.set()
            await turn
            yield Output([i])

    async def run(self) -> None:
        for _ in range(STEPS):
            await self.complete.wait()
            self.complete.clear()
            waiting, self.waiting = self.waiting, []
            for turn in waiting:
                turn.set_result(None)


class TestOnAsyncio:
    @pytest.fixture
    def frames(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """Every frame that a caller receives."""
        seen: list[object] = []
        received = TcpChannel.received

        def spy(self: TcpChannel, frame: Outputs | Data | End | Failure) -> None:
            seen.append(frame)
            received(self, frame)

        monkeypatch.setattr(TcpChannel, "received", spy)
        return seen

    async def test_64_streams_stepped_together_arrive_in_one_frame_per_step(self, frames: list[object]) -> None:
        engine = SteppedEngine()
        plane = TcpPlane()
        server = await plane.serve(engine, "127.0.0.1")
        channel = await plane.connect(server.address)
        streams = [channel.open("generate", b"", Context(str(i))) for i in range(STREAMS)]
        stepping = asyncio.create_task(engine.run())
        for stream in streams:
            got: list[Item] = []
            while items := await stream.read():
                got += items
            assert [item.token_ids for item in got if isinstance(item, Output)] == [[i] for i in range(STEPS)]
        await stepping
        batches = [frame for frame in frames if isinstance(frame, Outputs)]
        assert [len(batch.streams) for batch in batches] == [STREAMS] * STEPS
        assert sum(isinstance(frame, End) for frame in frames) == STREAMS
        await channel.close()
        await server.close()

    async def test_a_stream_that_mixes_kinds_does_not_reorder_itself_for_the_sake_of_the_batch(self, frames: list[object]) -> None:
        async def handler(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
            yield Output([0])
            yield b"1"
            yield Output([2])

        plane = TcpPlane()
        server = await plane.serve(handler, "127.0.0.1")
        channel = await plane.connect(server.address)
        stream = channel.open("x", b"", Context("a"))
        got: list[Item] = []
        while items := await stream.read():
            got += items
        assert got == [Output([0]), b"1", Output([2])]
        assert [type(frame) for frame in frames] == [Outputs, Data, Outputs, End]
        await channel.close()
        await server.close()

    async def test_a_batch_over_the_callers_frame_limit_is_split(self, frames: list[object]) -> None:
        async def handler(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
            for i in range(10):
                yield Output([i] * 300)

        plane = TcpPlane(max_frame_bytes=4096)
        server = await plane.serve(handler, "127.0.0.1")
        channel = await plane.connect(server.address)
        streams = [channel.open("x", b"", Context(str(i))) for i in range(10)]
        for stream in streams:
            got: list[Item] = []
            while items := await stream.read():
                got += items
            assert got == [Output([i] * 300) for i in range(10)]
        assert len(frames) > 10
        await channel.close()
        await server.close()


class TestOnUvloop(TestOnAsyncio):
    loop_factory = uvloop.new_event_loop
