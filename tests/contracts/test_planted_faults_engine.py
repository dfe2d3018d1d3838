"""The engine kit, cheated: each engine here breaks one guarantee, and the kit must find it under that guarantee's number."""

import asyncio
import inspect
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import start
from dynamo_core.engines import BlocksRemoved, BlocksStored, Engine, EngineContext, contract
from dynamo_core.engines.byte_tokenizer import TURN_END
from dynamo_core.engines.echo import EchoEngine
from dynamo_core.errors import EngineDead, EngineFailed, RequestError
from dynamo_core.types import Load, Output, Request, Sampling

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


# ------------------------------------------------------------------ the faults


class NotReadyWhenItSaysSo(Honest):
    """G1"""

    async def start(self, context: EngineContext) -> ModelCard:
        self.ready = asyncio.get_running_loop().time() + 0.02
        return await super().start(context)

    def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if asyncio.get_running_loop().time() < self.ready:
            raise EngineDead("still loading")
        return super().answer(request, context)


class NeverFinishes(Altered):
    """G2"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, finish_reason=None)


class RepeatsWhatItSaid(Altered):
    """G2"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, token_ids=list(so_far))


class InventsTokens(Altered):
    """G2"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, token_ids=[token + 1000 for token in output.token_ids])


class FinishesEveryOutput(Altered):
    """G2"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, finish_reason="length")


class KeepsThePlaceOfWhoLeft(Honest):
    """G3"""

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        await self.free.acquire()
        self.moved(+1)
        async for output in self.answer(request, context):
            yield output
        self.moved(-1)
        self.free.release()


class KeepsThePlaceQuietly(KeepsThePlaceOfWhoLeft):
    """G3"""

    def moved(self, change: int) -> None:
        self.context.load(Load(running=int(change > 0)))
        if change > 0:
            asyncio.get_running_loop().call_later(0.01, self.context.load, Load())


class OneTokenMore(Altered):
    """G4"""

    def alter(self, request: Request) -> Request:
        return with_stops(request, max_tokens=(request.stops.max_tokens or 1) + 1)


class OneTokenLess(Altered):
    """G4"""

    def alter(self, request: Request) -> Request:
        return with_stops(request, max_tokens=max(1, (request.stops.max_tokens or 1) - 1))


class IgnoresStopTokens(Altered):
    """G4"""

    def alter(self, request: Request) -> Request:
        return with_stops(request, stop_token_ids=())


class SwallowsTheStopToken(Altered):
    """G4"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return output if output.finish_reason != "stop" else msgspec.structs.replace(output, token_ids=[])


class DoesNotNameTheStop(Altered):
    """G4"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, stop_reason=None)


class IgnoresMinTokens(Altered):
    """G4"""

    def alter(self, request: Request) -> Request:
        return with_stops(request, min_tokens=0)


class EndsThoughToldToIgnoreTheEnd(Honest):
    """G4"""

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        made = 0
        async for output in super().answer(request, context):
            made += 1
            if made == 5:
                yield Output([TURN_END], finish_reason="stop")
                return
            yield output


class RunsPastTheContext(Honest):
    """G4"""

    async def start(self, context: EngineContext) -> ModelCard:
        card = await super().start(context)
        self._card = msgspec.structs.replace(card, context_length=2 * CONTEXT)
        return card


class HangsOnALongPrompt(Honest):
    """G5"""

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if len(request.token_ids) >= CONTEXT:
            await asyncio.Event().wait()
        async for output in super().answer(request, context):
            yield output


class CutsALongPrompt(Altered):
    """G5"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, token_ids=request.token_ids[: CONTEXT - 20])


class IsPoisonedByALongPrompt(Honest):
    """G5"""

    poisoned = False

    async def answer(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if self.poisoned:
            raise EngineFailed("the slot is in a bad state")
        self.poisoned = len(request.token_ids) >= CONTEXT
        async for output in super().answer(request, context):
            yield output


class AnswersOtherwiseInACrowd(Altered):
    """G6"""

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return output if self.running == 1 else msgspec.structs.replace(output, token_ids=[token ^ 1 for token in output.token_ids])


class StartsAgainInsteadOfContinuing(Altered):
    """G6"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, token_ids=request.token_ids[: len(request.token_ids) - request.resumed], resumed=0)


class AnswersByChance(Altered):
    """G6"""

    def __init__(self) -> None:
        super().__init__()
        self.flavour = next(_flavours)

    def output(self, request: Request, output: Output, so_far: list[int]) -> Output:
        return msgspec.structs.replace(output, token_ids=[(token + self.flavour) % 256 for token in output.token_ids])


_flavours = iter(range(10_000))


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


class GivesOneChoiceForMany(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, sampling=Sampling())


class IgnoresLogprobs(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, logprobs=None, prompt_logprobs=None)


class PromisesLogprobsAndForgets(Honest):
    """G9"""

    promises = {"capabilities": ("logprobs",)}


class PromisesBiasAndForgets(Altered):
    """G9"""

    promises = {"capabilities": ("logit_bias",)}


class TakesAnyAdapter(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, adapter=None)


class TakesAnySampling(Altered):
    """G9"""

    def alter(self, request: Request) -> Request:
        return msgspec.structs.replace(request, sampling=Sampling(n=max(1, request.sampling.n)))


class ServesAnotherTokenizer(Honest):
    """G9"""

    def artifact(self, digest: str) -> bytes:
        return super().artifact(digest) + b" "


class ServesWhateverDigest(Honest):
    """G9"""

    def artifact(self, digest: str) -> bytes:
        return self._tokenizer


class PromisesEventsAndSendsNone(Honest):
    """G9"""

    promises = {"kv_events": True}


class SendsEventsUnasked(Honest):
    """G9"""

    def moved(self, change: int) -> None:
        super().moved(change)
        self.context.kv_events([BlocksStored([1], None, [0] * 16)], 0)


class RemovesWhatWasNeverStored(PromisesEventsAndSendsNone):
    """G9"""

    def moved(self, change: int) -> None:
        super().moved(change)
        self.context.kv_events([BlocksRemoved([random.randrange(2**60)])], 0)


class NeverSaysThatItIsIdle(Honest):
    """G9"""

    def moved(self, change: int) -> None:
        self.running += change
        if self.running:
            self.context.load(Load(running=self.running))


# ------------------------------------------------------------------ the verdict


def test_the_page_the_contract_and_the_kit_have_the_same_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs/contracts/engine.md").read_text()
    kit = {name.split("_")[1].upper() for name, _ in inspect.getmembers(EngineContract, inspect.isfunction) if name.startswith("test_")}
    assert kit == set(re.findall(r"^\*\*(G\d+)\.\*\*", page, re.M)) == set(re.findall(r"^    (G\d+)  ", contract.__doc__ or "", re.M))


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


def planted() -> list[type[Honest]]:
    def below(cls: type[Honest]) -> Iterator[type[Honest]]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    return [engine for engine in dict.fromkeys(below(Honest)) if engine is not Altered]


def test_the_honest_engine_keeps_every_guarantee() -> None:
    assert broken_guarantees(Kit(), Honest) == {}
    assert broken_guarantees(Kit(), Altered) == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", planted(), ids=lambda engine: engine.__name__)
def test_a_planted_fault_is_found_under_its_number(engine: type[Honest]) -> None:
    assert engine.__doc__
    assert broken_guarantees(HastyKit(), engine, only=engine.__doc__.lower() + "_")


async def test_a_start_that_is_silent_for_too_long_is_found() -> None:
    running = await start(Honest())
    running.progress = [0.0, 9.0, 21.0]
    with pytest.raises(AssertionError, match="silent for 12 s"):
        await Kit().test_g1_progress_is_reported_at_least_every_ten_seconds(running)
