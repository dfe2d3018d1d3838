"""The engine kit, cheated in its start and its answers: each engine here breaks one guarantee, and the kit must find it under that guarantee's number."""

import asyncio
import inspect
import re
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from honest_engine import CONTEXT, Altered, Honest, Kit, broken_guarantees, is_found, planted, with_stops

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import start
from dynamo_core.engines import EngineContext, contract
from dynamo_core.engines.byte_tokenizer import TURN_END
from dynamo_core.errors import EngineDead, EngineFailed
from dynamo_core.types import Load, Output, Request


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", planted(__name__), ids=lambda engine: engine.__name__)
def test_a_planted_fault_is_found_under_its_number(engine: type[Honest]) -> None:
    assert is_found(engine)


def test_the_page_the_contract_and_the_kit_have_the_same_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs/contracts/engine.md").read_text()
    kit = {name.split("_")[1].upper() for name, _ in inspect.getmembers(EngineContract, inspect.isfunction) if name.startswith("test_")}
    assert kit == set(re.findall(r"^\*\*(G\d+)\.\*\*", page, re.M)) == set(re.findall(r"^ *(G\d+)  ", contract.__doc__ or "", re.M))


def test_the_honest_engine_keeps_every_guarantee() -> None:
    assert broken_guarantees(Kit(), Honest) == {}
    assert broken_guarantees(Kit(), Altered) == {}


async def test_a_start_that_is_silent_for_too_long_is_found() -> None:
    running = await start(Honest())
    running.progress = [0.0, 9.0, 21.0]
    with pytest.raises(AssertionError, match="silent for 12 s"):
        await Kit().test_g1_progress_is_reported_at_least_every_ten_seconds(running)
