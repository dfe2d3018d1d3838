"""The kit of request planes rejects planes that cheat: one planted fault after another, each caught under its number."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from dynamo_core.context import Context
from dynamo_core.contracts.transport import RequestPlaneContract
from dynamo_core.errors import Disconnected, DynamoError, EngineFailed
from dynamo_core.transport.contract import Channel, Handler, Item, RequestPlane, Server, Stream
from dynamo_core.transport.inprocess import InProcessPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tcp_server import TcpServerConnection
from dynamo_core.types import Output


class Kit(RequestPlaneContract):
    guard = 1.5
    held_outputs = 1024


class KitWithoutListener(Kit):
    listens = False


class Faulty:
    """A healthy in-process plane, except for what a subclass breaks."""

    scheme = "inproc"
    plane: RequestPlane = InProcessPlane()

    async def serve(self, handler: Handler, host: str) -> Server:
        return await self.plane.serve(lambda endpoint, payload, context: self.items(handler, endpoint, payload, context), host)

    async def connect(self, address: str) -> Channel:
        return FaultyChannel(self, await self.plane.connect(address))

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        async with contextlib.aclosing(handler(endpoint, payload, context)) as items:  # type: ignore[type-var]
            async for item in items:
                for sent in self.item(item):
                    yield sent

    def item(self, item: Item) -> Sequence[Item]:
        return (item,)

    async def read(self, stream: Stream) -> Sequence[Item]:
        return await stream.read()

    def cancel(self, stream: Stream, channel: Channel) -> None:
        stream.cancel()

    def open(self, channel: Channel, endpoint: str, payload: bytes, context: Context) -> Stream:
        return channel.open(endpoint, payload, context)


class FaultyChannel:
    def __init__(self, faults: Faulty, channel: Channel) -> None:
        self.faults, self.channel = faults, channel

    @property
    def closed(self) -> bool:
        return self.channel.closed

    def open(self, endpoint: str, payload: bytes, context: Context) -> Stream:
        return FaultyStream(self.faults, self.faults.open(self.channel, endpoint, payload, context), self.channel)

    async def close(self) -> None:
        await self.channel.close()


class FaultyStream:
    def __init__(self, faults: Faulty, stream: Stream, channel: Channel) -> None:
        self.faults, self.stream, self.channel = faults, stream, channel

    async def read(self) -> Sequence[Item]:
        return await self.faults.read(self.stream)

    def cancel(self) -> None:
        self.faults.cancel(self.stream, self.channel)


# ------------------------------------------------------------------ the faults


class LosesAnItem(Faulty):
    """t1"""

    def item(self, item: Item) -> Sequence[Item]:
        return () if isinstance(item, Output) and item.token_ids == [59] else (item,)


class SendsAnItemTwice(Faulty):
    """t1"""

    def item(self, item: Item) -> Sequence[Item]:
        return (item, item) if isinstance(item, Output) and item.token_ids == [59] else (item,)


class SwapsWhatItMerges(Faulty):
    """t1"""

    async def read(self, stream: Stream) -> Sequence[Item]:
        return sorted(await stream.read(), key=lambda item: isinstance(item, bytes))


class ForgetsAField(Faulty):
    """t1"""

    def item(self, item: Item) -> Sequence[Item]:
        if isinstance(item, Output) and item.transfer:
            item = Output(item.token_ids, item.index, item.finish_reason, item.stop_reason, item.logprobs, item.cached_tokens)
        return (item,)


class CutsLargePayloads(Faulty):
    """t1"""

    def open(self, channel: Channel, endpoint: str, payload: bytes, context: Context) -> Stream:
        return channel.open(endpoint, payload[: 2**20], context)


class CancelsTheNeighboursToo(Faulty):
    """t1"""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def open(self, channel: Channel, endpoint: str, payload: bytes, context: Context) -> Stream:
        self.streams.append(channel.open(endpoint, payload, context))
        return self.streams[-1]

    def cancel(self, stream: Stream, channel: Channel) -> None:
        for other in self.streams:
            other.cancel()


class CancelsOnlyHere(Faulty):
    """t2 t3"""

    def __init__(self) -> None:
        self.detached: set[asyncio.Task[None]] = set()

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        queue: asyncio.Queue[Item | None] = asyncio.Queue(64)

        async def pump() -> None:
            async for item in handler(endpoint, payload, context):
                await queue.put(item)
            await queue.put(None)

        self.detached.add(asyncio.create_task(pump()))
        while (item := await queue.get()) is not None:
            yield item


class ThrowsAwayWhatHadArrived(Faulty):
    """t2"""

    def __init__(self) -> None:
        self.cancelled: set[Stream] = set()

    async def read(self, stream: Stream) -> Sequence[Item]:
        return () if stream in self.cancelled else await stream.read()

    def cancel(self, stream: Stream, channel: Channel) -> None:
        self.cancelled.add(stream)
        stream.cancel()


class EndsSilentlyWhenTheWorkerGoes(Faulty):
    """t3"""

    async def read(self, stream: Stream) -> Sequence[Item]:
        try:
            return await stream.read()
        except Disconnected:
            return ()


class FlattensErrors(Faulty):
    """t4"""

    async def read(self, stream: Stream) -> Sequence[Item]:
        try:
            return await stream.read()
        except DynamoError as e:
            raise EngineFailed(str(e)) from e


class ErrorsOvertakeItems(Faulty):
    """t4"""

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        for item in [item async for item in handler(endpoint, payload, context)]:
            yield item


class TellsDetailsOfACrash(Faulty):
    """t4"""

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        try:
            async for item in handler(endpoint, payload, context):
                yield item
        except ZeroDivisionError as e:
            raise EngineFailed(str(e)) from e


class HoldsMoreThanItSays(Faulty):
    """t6"""

    plane = InProcessPlane(window_items=4000)


class HoldsTooManyBytes(Faulty):
    """t6"""

    plane = InProcessPlane(window_bytes=100 * 2**20)


class OneStreamAtATime(Faulty):
    """t6"""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        async with self.turn:
            async for item in super().items(handler, endpoint, payload, context):
                yield item


class NeverMerges(Faulty):
    """t7"""

    def __init__(self) -> None:
        self.left: list[Item] = []

    async def read(self, stream: Stream) -> Sequence[Item]:
        self.left = self.left or list(await stream.read())
        return [self.left.pop(0)] if self.left else ()


class ForgetsTheTenant(Faulty):
    """t8"""

    def open(self, channel: Channel, endpoint: str, payload: bytes, context: Context) -> Stream:
        return channel.open(endpoint, payload, Context(context.id, deadline=context.deadline, priority=context.priority, session=context.session,
                                                       traceparent=context.traceparent))


class ComparesClocksOfTwoMachines(Faulty):
    """t8"""

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        context.deadline = context.remaining()
        async for item in super().items(handler, endpoint, payload, context):
            yield item


class SharesOneContext(Faulty):
    """t8"""

    def __init__(self) -> None:
        self.contexts: dict[str, Context] = {}

    def open(self, channel: Channel, endpoint: str, payload: bytes, context: Context) -> Stream:
        self.contexts[context.id] = context
        return channel.open(endpoint, payload, context)

    async def items(self, handler: Handler, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        async for item in super().items(handler, endpoint, payload, self.contexts.get(context.id, context)):
            yield item


FAULTS = Faulty.__subclasses__()


# ------------------------------------------------------------------ running the kit


def cases(kit: RequestPlaneContract, number: str) -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Every test of the guarantee, with each of its parameters."""
    found: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
    for name, test in inspect.getmembers(kit, inspect.iscoroutinefunction):
        if name.startswith(f"test_{number}_"):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            found += [(name, test, {mark.args[0]: value}) for mark in marks for value in mark.args[1]] or [(name, test, {})]
    return found


async def rejections(kit: RequestPlaneContract, make: Callable[[], RequestPlane], number: str, *, all_of_them: bool = False) -> list[str]:
    """The tests of the guarantee that fail; stops at the first unless asked for all."""
    failed: list[str] = []
    for name, test, parameters in cases(kit, number):
        try:
            async with asyncio.timeout(20):
                await test(make(), **parameters)
        except (Exception, pytest.fail.Exception):
            failed.append(name)
            if not all_of_them:
                break
    return failed


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_the_kit_rejects_a_plane_that(fault: type[Faulty]) -> None:
    for number in (fault.__doc__ or "").split():
        assert await rejections(KitWithoutListener(), fault, number), f"{fault.__name__} got past {number}"


async def test_the_kit_rejects_a_plane_that_drops_everybody_for_one_bad_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(self: TcpServerConnection, reason: str) -> None:
        for connection in list(self._server.connections):
            connection.hang_up(reason)

    monkeypatch.setattr(TcpServerConnection, "drop", drop)
    assert await rejections(Kit(), TcpPlane, "t5")


@pytest.mark.parametrize("number", [f"t{i}" for i in range(1, 9)])
async def test_the_kit_accepts_the_harness_without_a_fault(number: str) -> None:
    kit = KitWithoutListener()
    kit.guard = 20.0
    assert cases(kit, number)
    assert await rejections(kit, Faulty, number, all_of_them=True) == []
