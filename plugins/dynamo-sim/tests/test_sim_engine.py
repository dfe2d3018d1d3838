"""The simulated engine keeps the engine contract, at any speed and under every pressure."""

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.engines import Engine, EngineContext, KvEvent
from dynamo_core.errors import EngineDead
from dynamo_core.types import Load, Output, Request, Sampling, Stops
from dynamo_sim.engine import SimEngine


class SimContract(EngineContract):
    reports_load = True
    options: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def engine_factory(self) -> Callable[[], Engine]:
        return lambda: SimEngine(**{"speedup": 0.0, "context_length": 2048, **self.options})

    @pytest.fixture
    def prompt(self) -> list[int]:
        return [(37 * i) % 2000 for i in range(40)]


class TestAsFastAsItGoes(SimContract):
    pass


class TestInScaledTime(SimContract):
    options: ClassVar = {"speedup": 100.0}


class TestAnswersThatEndByThemselves(SimContract):
    options: ClassVar = {"output_tokens": 10}
    natural_tokens = 16


class TestWithHardlyAnyCache(SimContract):
    """The crowd does not fit: sequences are preempted and computed again, and nobody can tell from the answers."""

    options: ClassVar = {"block_size": 4, "total_blocks": 40, "context_length": 160, "max_batched_tokens": 32}
    max_tokens = 48


class TestOldestGivesWay(TestWithHardlyAnyCache):
    options: ClassVar = {**TestWithHardlyAnyCache.options, "preemption": "fifo"}


class TestWithoutPrefixCaching(TestWithHardlyAnyCache):
    options: ClassVar = {**TestWithHardlyAnyCache.options, "prefix_caching": False}


class TestWithoutChunkedPrefill(SimContract):
    options: ClassVar = {"chunked_prefill": False, "block_size": 16, "total_blocks": 20, "context_length": 256, "max_batched_tokens": 256}


class TestOneAtATime(SimContract):
    options: ClassVar = {"max_sequences": 1}


# ------------------------------------------------------------------ beyond the contract


class Told:
    """An engine context that remembers."""

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self.events: list[KvEvent] = []
        self.progress: list[float | None] = []
        self.context = EngineContext(
            load=self.loads.append, kv_events=lambda events, rank: self.events.extend(events), progress=lambda phase, fraction: self.progress.append(fraction)
        )


async def ask(engine: SimEngine, prompt: list[int], count: int = 8, *, id: str = "r", sampling: Sampling | None = None, **stops: Any) -> list[Output]:
    request = Request(id=id, model="sim", token_ids=prompt, sampling=sampling or Sampling(temperature=0.0), stops=Stops(max_tokens=count, **stops))
    return [output async for output in engine.generate(request, Context(id))]


def tokens(outputs: list[Output], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


async def test_a_prompt_that_was_seen_before_comes_from_the_cache() -> None:
    engine = SimEngine(speedup=0, block_size=16)
    await engine.start(EngineContext())
    prompt = list(range(100))
    assert [(await ask(engine, prompt))[0].cached_tokens for _ in range(2)] == [0, 96]
    assert (await ask(engine, [*prompt[:50], 7, 7]))[0].cached_tokens == 48
    await engine.stop()


async def test_requests_of_different_salts_share_no_block() -> None:
    engine = SimEngine(speedup=0, block_size=16)
    await engine.start(EngineContext())
    cached = []
    for salt in (None, "a", "b", "a"):
        request = Request(id="r", model="sim", token_ids=list(range(100)), stops=Stops(max_tokens=1), cache_salt=salt)
        cached.append([output.cached_tokens async for output in engine.generate(request, Context("r"))])
    assert cached == [[0], [0], [0], [96]]
    await engine.stop()


async def test_reset_cache_forgets_what_nobody_uses_and_says_so() -> None:
    told = Told()
    engine = SimEngine(speedup=0, block_size=16)
    await engine.start(told.context)
    await ask(engine, list(range(100)))
    assert await engine.controls()["reset_cache"]({}) == {"blocks": 6}
    assert (await ask(engine, list(range(100))))[0].cached_tokens == 0
    assert len(told.events) == 3
    await engine.stop()


async def test_with_temperature_the_seed_decides() -> None:
    engine = SimEngine(speedup=0)
    await engine.start(EngineContext())

    async def draw(seed: int | None, id: str) -> list[int]:
        return tokens(await ask(engine, [1, 2, 3], id=id, sampling=Sampling(temperature=0.8, seed=seed)))

    assert await draw(1, "a") == await draw(1, "b")
    assert await draw(1, "a") != await draw(2, "a")
    assert await draw(None, "a") != await draw(None, "b")
    await engine.stop()


async def test_choices_differ_with_temperature_and_agree_without() -> None:
    engine = SimEngine(speedup=0)
    await engine.start(EngineContext())
    warm = await ask(engine, [1, 2, 3], sampling=Sampling(temperature=1.0, seed=1, n=2))
    assert tokens(warm, 0) != tokens(warm, 1)
    cold = await ask(engine, [1, 2, 3], sampling=Sampling(temperature=0.0, n=2))
    assert tokens(cold, 0) == tokens(cold, 1)
    await engine.stop()


async def test_the_cached_tokens_of_a_request_come_once_on_its_first_output() -> None:
    engine = SimEngine(speedup=0)
    await engine.start(EngineContext())
    outputs = await ask(engine, [1, 2, 3], sampling=Sampling(temperature=1.0, n=3))
    assert [output.cached_tokens for output in outputs] == [0] + [None] * (len(outputs) - 1)
    await engine.stop()


async def test_an_engine_of_another_seed_answers_otherwise() -> None:
    answers = []
    for seed in (0, 1):
        engine = SimEngine(speedup=0, seed=seed)
        await engine.start(EngineContext())
        answers.append(tokens(await ask(engine, [1, 2, 3])))
        await engine.stop()
    assert answers[0] != answers[1]


async def test_all_streams_of_a_step_are_woken_in_the_same_turn_of_the_loop() -> None:
    engine = SimEngine(pace_ms=5)
    await engine.start(EngineContext())
    turn = 0
    turns: list[list[int]] = []

    async def read(prompt: list[int]) -> None:
        mine: list[int] = []
        turns.append(mine)
        request = Request(id="r", model="sim", token_ids=prompt, stops=Stops(max_tokens=10))
        async for _ in engine.generate(request, Context("r")):
            mine.append(turn)

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    await asyncio.gather(*(read([i, i + 1]) for i in range(20)))
    counting.cancel()
    assert all(mine == turns[0] for mine in turns)
    assert len(set(turns[0])) == 10
    await engine.stop()


async def test_a_late_reader_gets_what_has_gathered_in_one_output() -> None:
    engine = SimEngine(speedup=0)
    await engine.start(EngineContext())
    request = Request(id="r", model="sim", token_ids=[1, 2, 3], stops=Stops(max_tokens=50))
    stream = engine.generate(request, Context("r"))
    first = await anext(stream)
    await ask(engine, [4, 5, 6], 60)
    rest = [output async for output in stream]
    assert [len(output.token_ids) for output in rest] == [50 - len(first.token_ids)]
    assert rest[-1].finish_reason == "length"
    await engine.stop()


async def test_start_up_takes_its_time_and_shows_progress() -> None:
    told = Told()
    engine = SimEngine(startup_time=0.05)
    before = asyncio.get_running_loop().time()
    await engine.start(told.context)
    assert asyncio.get_running_loop().time() - before >= 0.049
    assert told.progress[0] == 0.0
    assert told.progress[-1] == 1.0
    await engine.stop()


async def test_without_kv_events_none_are_promised_and_none_are_sent() -> None:
    told = Told()
    engine = SimEngine(speedup=0, kv_events=False)
    assert not (await engine.start(told.context)).kv_events
    await ask(engine, list(range(200)))
    assert not told.events
    await engine.stop()


async def test_an_engine_that_breaks_says_so_and_ends_its_streams() -> None:
    deaths: list[str] = []

    def explode(load: Load) -> None:
        if load.waiting:
            raise RuntimeError("planted")

    engine = SimEngine(speedup=0)
    await engine.start(EngineContext(load=explode, died=deaths.append))
    with pytest.raises(EngineDead):
        await ask(engine, [1, 2, 3], 1000)
    assert len(deaths) == 1
    await engine.stop()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 1000, "total_blocks": 10, "block_size": 16}, "must fit in the cache"),
        ({"context_length": 1000, "max_batched_tokens": 500, "chunked_prefill": False}, "without chunked prefill"),
        ({"preemption": "random"}, "preemption"),
        ({"speedup": -1}, "speedup"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimEngine(**options)
