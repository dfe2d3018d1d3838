"""The engine kit, cheated in its crowds and its end: each engine here breaks one guarantee, and the kit must find it under that guarantee's number."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from honest_engine import Honest, is_found, planted

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.errors import EngineDead, EngineFailed, RequestError
from dynamo_core.types import Output, Request


class WaitsForItsSlowestReader(Honest):
    """G7"""

    async def start(self, context: EngineContext) -> ModelCard:
        self.reading = asyncio.Lock()
        return await super().start(context)

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        async with self.reading:
            async for output in super().answer(request, context):
                yield output


class FailsAllWhenOneFails(Honest):
    """G7"""

    failures = 0

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        failures = self.failures
        try:
            async for output in super().answer(request, context):
                if self.failures > failures:
                    raise EngineFailed("the batch failed")
                yield output
        except RequestError:
            self.failures += 1
            raise


class LeavesStreamsHangingOnStop(Honest):
    """G8"""

    stopped = False

    async def stop(self) -> None:
        self.stopped = True

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if self.stopped:
            raise EngineDead("stopped")
        async for output in super().answer(request, context):
            if self.stopped:
                await asyncio.Event().wait()
            yield output


class ForgetsUnreadStreamsOnStop(Honest):
    """G8"""

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        async for output in super().answer(request, context):
            yield output
            if self._card is None:
                await asyncio.Event().wait()


class EndsStreamsSilentlyOnStop(Honest):
    """G8"""

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        alive = self._card is not None
        try:
            async for output in super().answer(request, context):
                yield output
        except EngineDead:
            if not alive:
                raise


class GoesOnAfterStop(Honest):
    """G8"""

    async def stop(self) -> None:
        pass


class LeavesATaskBehind(Honest):
    """G8"""

    async def start(self, context: EngineContext) -> ModelCard:
        self.task = asyncio.create_task(asyncio.Event().wait())
        return await super().start(context)


class CannotBeStoppedTwice(Honest):
    """G8"""

    async def stop(self) -> None:
        if self._card is None:
            raise RuntimeError("not running")
        await super().stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", planted(__name__), ids=lambda engine: engine.__name__)
def test_a_planted_fault_is_found_under_its_number(engine: type[Honest]) -> None:
    assert is_found(engine)
