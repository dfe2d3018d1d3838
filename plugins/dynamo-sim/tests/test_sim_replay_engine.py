"""The engine of the replay takes the same steps as the scheduler of the simulated engine, only many at once and without tokens."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_sim.replay.cache import BlockCache
from dynamo_sim.replay.engine import BlockEngine, Job
from dynamo_sim.scheduler import Limits, Scheduler, Sequence
from dynamo_sim.timing import Fixed, Linear, Polynomial, Roofline, Timing
from dynamo_sim.vocabulary import built_in

WORDS = built_in().answers
Times = dict[int, tuple[float, float, int]]
"""Request: first token, end, cached tokens."""


class Seen:
    def __init__(self) -> None:
        self.first: dict[int, float] = {}
        self.times: Times = {}
        self.grown: dict[int, list[int]] = {}

    def first_token(self, job: Job, now: float) -> None:
        self.first[job.number] = now

    def grew(self, job: Job, tokens: int, now: float) -> None:
        self.grown.setdefault(job.number, []).append(tokens)

    def finished(self, job: Job, now: float) -> None:
        self.times[job.number] = (self.first[job.number], now, job.cached)


Work = list[tuple[float, list[int], int]]
"""Arrival, block names, output tokens, in order of arrival; the prompt is three tokens longer than its full blocks."""


def by_jumps(work: Work, limits: Limits, timing: Timing) -> tuple[Times, BlockEngine, Seen]:
    seen = Seen()
    engine = BlockEngine(limits, timing, seen, BlockCache(limits.total_blocks, watched=True))
    arrivals = list(enumerate(work))
    now = 0.0
    while arrivals or engine.end < math.inf:
        if arrivals and arrivals[0][1][0] < engine.end:
            number, (now, names, output) = arrivals.pop(0)
            engine.add(Job(number, len(names) * limits.block_size + 3, output, np.array(names, np.uint64)), now)
        else:
            now = engine.end
            engine.finish()
        if engine.end == math.inf and not (arrivals and arrivals[0][1][0] <= now):
            engine.begin(now)
    return seen.times, engine, seen


def by_steps(work: Work, limits: Limits, timing: Timing) -> Times:
    scheduler = Scheduler(limits, timing, WORDS)
    arrivals = list(enumerate(work))
    first: dict[int, float] = {}
    times: Times = {}
    now = 0.0
    while arrivals or not scheduler.idle:
        if scheduler.idle:
            now = max(now, arrivals[0][1][0])
        while arrivals and arrivals[0][1][0] <= now:
            number, (_, names, output) = arrivals.pop(0)
            prompt = [name * 1000 + i for name in names for i in range(limits.block_size)] + [999_999 + number] * 3
            scheduler.add(Sequence(prompt, output, 0, owner=number))
        step = scheduler.step()
        now += step.duration_ms
        for sequence in step.sequences:
            first.setdefault(sequence.owner, now)
            if sequence.finish_reason:
                times[sequence.owner] = (first[sequence.owner], now, sequence.cached_tokens)
    return times


@st.composite
def workloads(draw: Any) -> Work:
    """Prompts from few families, so that prefixes are shared; never two of a family close enough to be admitted in one step."""
    work: Work = []
    at = 0.0
    fresh = 10
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0.5, 3.25, 40.0, 200.0, 900.0]))
        family = draw(st.integers(1, 3))
        shared = draw(st.integers(0, 6)) if at > 400 and all(at - a > 400 for a, names, _ in work if names and names[0] // 100 == family) else 0
        names = [family * 100 + i for i in range(shared)] + [1000 + fresh + i for i in range(draw(st.integers(0 if shared else 1, 8)))]
        fresh += 10
        work.append((at, names, draw(st.integers(1, 60))))
    return work


@settings(max_examples=60, deadline=None)
@given(workloads(), st.sampled_from(["polynomial", "linear", "roofline", "fixed"]))
def test_it_agrees_with_the_scheduler_of_the_engine(work: Work, name: str) -> None:
    limits = Limits(total_blocks=4096, block_size=16, max_sequences=4, max_batched_tokens=64)
    timing: Timing = {"polynomial": Polynomial(4096), "linear": Linear(), "roofline": Roofline(16), "fixed": Fixed(7.0)}[name]
    fast, slow = by_jumps(work, limits, timing)[0], by_steps(work, limits, timing)
    assert fast.keys() == slow.keys()
    for number, (first, end, cached) in slow.items():
        assert fast[number] == (pytest.approx(first, rel=1e-9), pytest.approx(end, rel=1e-9), cached)


@settings(max_examples=60, deadline=None)
@given(workloads(), st.integers(18, 40), st.booleans())
def test_everybody_is_served_and_every_block_comes_back_when_blocks_are_scarce(work: Work, blocks: int, chunked: bool) -> None:
    limits = Limits(total_blocks=blocks, block_size=16, max_sequences=4, max_batched_tokens=64 if chunked else 320, chunked_prefill=chunked)
    times, engine, seen = by_jumps(work, limits, Linear())
    assert times.keys() == set(range(len(work)))
    assert engine.idle
    assert engine.cache.used == 0
    assert sum(engine.itl.values()) == pytest.approx(sum(output - 1 for _, _, output in work), abs=0) or engine.preempted
    for number, grown in seen.grown.items():
        assert grown == sorted(grown)
        assert max(grown) <= work[number][2]


def test_output_is_reported_at_every_block_boundary() -> None:
    _, _, seen = by_jumps([(0.0, [1, 2], 50)], Limits(total_blocks=64, block_size=16), Fixed(1.0))
    assert seen.grown == {0: [14, 30, 46]}


@pytest.mark.parametrize("timing", [Polynomial(1000), Linear(), Roofline(64), Fixed(3.0)])
@pytest.mark.parametrize(("read", "growth", "steps"), [(0.0, 0.5, 1), (10.5, 0.25, 400), (900.0, 1.5, 200), (2000.0, 1.0, 7)])
def test_many_decode_steps_at_once_take_as_long_as_one_by_one(timing: Timing, read: float, growth: float, steps: int) -> None:
    one_by_one = sum(timing.step_ms(0, 8, read + k * growth) for k in range(steps))
    assert timing.decode_ms(8, read, growth, steps) == pytest.approx(one_by_one)


def test_a_budget_below_one_token_for_each_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens"):
        BlockEngine(Limits(max_sequences=64, max_batched_tokens=32), Fixed(1.0), Seen(), BlockCache(64, watched=False))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2)), max_size=60), st.integers(8, 20))
def test_the_cache_evicts_as_an_ordered_dictionary_would(history: list[tuple[int, int, int, int]], total: int) -> None:
    """Take a chain, give back an earlier one: against the obvious model."""
    cache = BlockCache(total, watched=True)
    users: dict[int, int] = {}
    idle: OrderedDict[int, None] = OrderedDict()
    mirror: set[int] = set()
    nameless = -1
    held: list[tuple[list[int], int, int]] = []
    for family, length, private, back in history:
        chain = [family * 100 + i + 1 for i in range(length)]
        fresh = [b for b in chain if b not in users and b not in idle]
        free = total - len(users) - len(idle) - sum(p for _, p, _ in held)
        possible = len(fresh) + private <= free + len([b for b in idle if b not in chain])
        assert cache.depth(chain, length) == length - len(fresh)
        assert cache.take(chain, np.array(chain, np.uint64), 0, length, private) == possible
        if possible:
            for block in chain:
                idle.pop(block, None)
                users[block] = users.get(block, 0) + 1
            while len(users) + len(idle) + private + sum(p for _, p, _ in held) > total:
                idle.popitem(last=False)
            held.append((chain, private, min(private, back)))
        if back and held:
            chain, private, generated = held.pop(0)
            cache.release(chain, np.array(chain, np.uint64), len(chain), private, generated)
            for _ in range(generated):
                idle[nameless] = None
                nameless -= 1
            for block in reversed(chain):
                users[block] -= 1
                if not users[block]:
                    del users[block]
                    idle[block] = None
        for stored, keys in cache.drain():
            (mirror.update if stored else mirror.difference_update)(keys.tolist())
        assert mirror == {*users, *(b for b in idle if b > 0)}
        assert cache.used == len(users) + sum(p for _, p, _ in held)
