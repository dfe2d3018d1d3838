"""The engine that faults are planted in, and the kit that must find them."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import start
from dynamo_core.engines import Engine, EngineContext
from dynamo_core.engines.echo import EchoEngine
from dynamo_core.types import Load, Output, Request

PROMPT = list(b"abcdefghijklmnopqrstuvwxyz0123456789")
CONTEXT = 256


class Kit(EngineContract):
    reports_load = True
    crowd = 4
    max_tokens = 12


class HastyKit(Kit):
    """For faults: some of them hang."""

    patience = 0.5


class Honest(EchoEngine):
    """Echo with a limited number of places and a report of its load: the engine that all faults are planted in."""

    places = 8
    promises: dict[str, Any] = {}

    def __init__(self) -> None:
        super().__init__(context_length=CONTEXT)
        self.running = 0

    async def start(self, context: EngineContext) -> ModelCard:
        self.context = context
        self.free = asyncio.Semaphore(self.places)
        card = await super().start(context)
        self._card = msgspec.structs.replace(card, max_sequences=self.places, **self.promises)
        return self._card

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        async with self.free:
            self.moved(+1)
            try:
                async with aclosing(self.answer(request, context)) as outputs:
                    async for output in outputs:
                        yield output
            finally:
                self.moved(-1)

    def moved(self, change: int) -> None:
        self.running += change
        self.context.load(Load(running=self.running))

    def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        return super().generate(request, context)


class Altered(Honest):
    """Honest, but for what `alter` does to a request and `output` to what comes back."""

    def alter(self, request: Request) -> Request:
        return request

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return output

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        so_far: list[int] = []
        async for output in super().answer(self.alter(request), context):
            so_far += output.token_ids
            yield self.output(request, output, so_far)


def with_stops(request: Request, **stops: Any) -> Request:
    return msgspec.structs.replace(request, stops=msgspec.structs.replace(request.stops, **stops))


def cases(test: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    if not marks:
        yield {}
    for mark in marks:
        for value in mark.args[1]:
            yield {mark.args[0]: value}


async def one(kit: EngineContract, test: Callable[..., Any], factory: Callable[[], Engine], arguments: dict[str, Any]) -> None:
    wanted = inspect.signature(test).parameters
    given: dict[str, Any] = {"engine_factory": factory, "prompt": PROMPT, **arguments}
    running = await start(factory()) if "running" in wanted else None
    await test(kit, **{name: value for name, value in {**given, "running": running}.items() if name in wanted})
    if running is not None:
        await running.engine.stop()


def broken_guarantees(kit: EngineContract, factory: Callable[[], Engine], only: str = "") -> dict[str, BaseException]:
    """Run the kit, or its tests of one guarantee; the tests that failed, and why."""
    broken: dict[str, BaseException] = {}
    for name, test in inspect.getmembers(Kit, inspect.isfunction):
        if name.startswith(f"test_{only}"):
            for arguments in cases(test):
                try:
                    asyncio.run(one(kit, test, factory, arguments))
                except (Exception, pytest.fail.Exception) as e:
                    broken[name] = e
    return broken


def planted(module: str) -> list[type[Honest]]:
    """The faults that a module plants: every engine there whose docstring is the number of a guarantee."""

    def below(cls: type[Honest]) -> Iterator[type[Honest]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    return [engine for engine in dict.fromkeys(below(Honest)) if engine.__module__ == module]


def is_found(engine: type[Honest]) -> bool:
    """Whether the kit finds the fault under the number that it is planted at."""
    assert engine.__doc__
    return bool(broken_guarantees(HastyKit(), engine, only=engine.__doc__.lower() + "_"))
