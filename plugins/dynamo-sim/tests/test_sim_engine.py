"""The simulated engine keeps the engine contract, at any speed and under every pressure."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dynamo_core.config import structure
from dynamo_core.context import Context
from dynamo_core.contracts.engine import EngineContract
from dynamo_core.engines import Engine, EngineContext, KvEvent
from dynamo_core.errors import ConfigError, EngineDead
from dynamo_core.plugins import Plugins
from dynamo_core.types import Load, Output, Request, Sampling, Stops
from dynamo_sim.engine import SimEngine
from dynamo_sim.timing import Linear


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


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        poll = self._selector.select  # type: ignore[attr-defined]

        def select(timeout: float | None) -> Any:
            ready = poll(0)
            if not ready and timeout:
                self.now += timeout
            return ready

        self._selector.select = select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


def in_virtual_time(engine: SimEngine, *requests: tuple[int, int]) -> tuple[float, list[list[int]]]:
    """Seconds until all answers are there, and the answers; each request is a prompt length and a token count."""

    async def main() -> tuple[float, list[list[int]]]:
        await engine.start(EngineContext())
        answers = await asyncio.gather(*(ask(engine, list(range(i, i + length)), count) for i, (length, count) in enumerate(requests)))
        took = asyncio.get_running_loop().time()
        await engine.stop()
        return took, [tokens(answer) for answer in answers]

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def test_an_hour_passes_at_once_on_a_virtual_clock_and_exactly() -> None:
    took, answers = in_virtual_time(SimEngine(pace_ms=1000, total_blocks=4096), (10, 3600), (20, 3600))
    assert took == pytest.approx(3600)
    assert [len(answer) for answer in answers] == [3600, 3600]


def test_time_on_a_virtual_clock_is_the_published_formula() -> None:
    took, _ = in_virtual_time(SimEngine(), (1000, 1))
    assert took == pytest.approx((4.209989e-7 * 1e6 + 15.18344 + 16.50142) / 1000)
    assert in_virtual_time(SimEngine(speedup=4), (1000, 1))[0] == pytest.approx(took / 4)


def test_answers_do_not_depend_on_the_clock() -> None:
    work = [(10, 50), (300, 20), (77, 33)]
    assert in_virtual_time(SimEngine(), *work)[1] == in_virtual_time(SimEngine(linear=Linear(), speedup=3), *work)[1]


# ------------------------------------------------------------------ as a plugin


def test_it_is_found_by_name() -> None:
    assert Plugins.load().find("engine", "sim").load() is SimEngine


def test_its_options_are_read_from_the_configuration() -> None:
    engine = structure(SimEngine, {"speedup": 2, "linear": {"step": 3}, "preemption": "fifo", "model_path": "/models/m"})
    assert (engine.speedup, engine.linear, engine.preemption, engine.model_path) == (2.0, Linear(step=3.0), "fifo", Path("/models/m"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed_up": 2}, "did you mean 'speedup'"),
        ({"block_size": 0}, "block_size"),
        ({"linear": {"step": -1}}, "step"),
        ({"pace_ms": 20, "linear": {}}, "exclude each other"),
        ({"total_blocks": 10}, "must fit in the cache"),
    ],
)
def test_mistakes_in_its_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(SimEngine, options)
