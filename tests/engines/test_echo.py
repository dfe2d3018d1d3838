"""The echo engine keeps the engine contract, and answers with the prompt."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import Running, start
from dynamo_core.engines import Engine, EngineContext
from dynamo_core.engines.byte_tokenizer import TURN_END, TURN_START
from dynamo_core.engines.echo import EchoEngine
from dynamo_core.errors import EngineDead, RequestError
from dynamo_core.types import Output, Request, Sampling, Stops


class TestEcho(EngineContract):
    @pytest.fixture
    def engine_factory(self) -> Callable[[], Engine]:
        return EchoEngine

    @pytest.fixture
    def prompt(self) -> list[int]:
        return list(b"What is the meaning of life?")


@pytest.mark.asyncio(loop_scope="module")
class TestOneEngineForAllTests(TestEcho):
    """How an engine that takes long to start is tested: started once, and shared by its tests."""

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    @classmethod
    async def running(cls) -> AsyncIterator[Running]:
        running = await start(EchoEngine())
        yield running
        await running.engine.stop()


async def answer(engine: EchoEngine, prompt: bytes | list[int], **stops: object) -> list[Output]:
    request = Request(id="1", model="echo", token_ids=list(prompt), stops=Stops(**stops))
    return [output async for output in engine.generate(request, Context("1"))]


@pytest.fixture
async def engine():
    engine = EchoEngine()
    await engine.start(EngineContext())
    yield engine
    await engine.stop()


async def test_without_max_tokens_the_prompt_comes_once_and_then_the_end(engine: EchoEngine) -> None:
    outputs = await answer(engine, b"hello")
    assert [token for output in outputs for token in output.token_ids] == [*b"hello", TURN_END]
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].stop_reason is None


async def test_special_tokens_are_not_repeated(engine: EchoEngine) -> None:
    outputs = await answer(engine, [TURN_START, *b"hi", TURN_END], max_tokens=4)
    assert [token for output in outputs for token in output.token_ids] == list(b"hihi")


async def test_a_prompt_of_special_tokens_alone_still_gets_an_answer(engine: EchoEngine) -> None:
    outputs = await answer(engine, [TURN_START, TURN_END], max_tokens=2)
    assert [token for output in outputs for token in output.token_ids] == list(b"..")


async def test_a_resumed_answer_ends_where_it_would_have_ended(engine: EchoEngine) -> None:
    request = Request(id="1", model="echo", token_ids=list(b"hellohe"), resumed=2)
    outputs = [output async for output in engine.generate(request, Context("1"))]
    assert [token for output in outputs for token in output.token_ids] == [*b"llo", TURN_END]


async def test_stop_cuts_a_long_delay_short() -> None:
    engine = EchoEngine(delay=3600)
    await engine.start(EngineContext())
    reading = asyncio.create_task(answer(engine, b"hello"))
    await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(EngineDead):
        await asyncio.wait_for(reading, 10)


async def test_a_stream_that_nobody_reads_while_the_engine_stops_ends_when_it_is_read_again() -> None:
    engine = EchoEngine()
    await engine.start(EngineContext())
    stream = engine.generate(Request(id="1", model="echo", token_ids=[1, 2, 3]), Context("1"))
    await anext(stream)
    await engine.stop()
    with pytest.raises(EngineDead):
        await anext(stream)


async def test_what_it_does_not_promise_is_refused_by_name(engine: EchoEngine) -> None:
    request = Request(id="1", model="echo", token_ids=[1], sampling=Sampling(n=2))
    with pytest.raises(RequestError, match="does not support n"):
        await anext(engine.generate(request, Context("1")))
