"""How many replicas meet a target: by formula, and against a queue that is played through."""

from __future__ import annotations

import heapq
import math
import random
import statistics

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_planner.contract import Load
from dynamo_planner.history import merged
from dynamo_planner.performance.live import Linear
from dynamo_planner.stages import capacity
from dynamo_planner.stages.capacity import Demand, Work

ENGINE = Linear(step=0.005, sequence=0.0002, read=1e-8, prompt=0.01, prompt_token=2e-5, seen=64.0, source="a test")
RATES = st.floats(0.0, 200.0, allow_nan=False)
LENGTHS = st.floats(16, 20_000, allow_nan=False)
OUTPUTS = st.floats(1, 2_000, allow_nan=False)
TARGETS = st.floats(0.02, 5.0, allow_nan=False)
ITLS = st.floats(0.004, 0.2, allow_nan=False)


def test_the_waiting_probability_is_erlangs():
    assert capacity.waiting(1, 0.5) == pytest.approx(0.5)
    assert capacity.waiting(2, 1.0) == pytest.approx(1 / 3)
    assert capacity.waiting(5, 4.0) == pytest.approx(0.5541, abs=1e-4)
    assert capacity.waiting(3, 3.0) == 1.0
    assert capacity.waiting(4, 0.0) == 0.0


def test_the_late_share_is_what_a_queue_that_is_played_through_has():
    chance, servers, rate, work, target = random.Random(1), 4, 30.0, 0.1, 0.25
    free, now, late, count = [0.0] * servers, 0.0, 0, 200_000
    for _ in range(count):
        now += chance.expovariate(rate)
        start = max(now, free[0])
        heapq.heapreplace(free, start + chance.expovariate(1 / work))
        late += start - now > target - work
    assert late / count == pytest.approx(capacity.late(servers, rate, Work([work]), target), rel=0.1)


@pytest.mark.parametrize("spread", [0.5, 1.7, 3.0])
def test_prompts_of_very_different_lengths_are_read_in_time_by_as_many_replicas_as_are_asked_for(spread):
    @attrs.frozen
    class Engine(Linear):
        def prefill(self, tokens: float) -> float:
            return 0.0165 + 1.518e-5 * tokens + 4.21e-10 * tokens**2

    engine, target, share, rate, mean = Engine(0.005, 0.0002, 1e-8, 0.0, 0.0, 64.0, "a test"), 2.0, 0.95, 20.0, 12_000.0
    chance, sigma = random.Random(2), math.sqrt(math.log1p(spread))
    drawn = [min(131_072.0, mean * math.exp(sigma * chance.gauss(0, 1) - sigma**2 / 2)) for _ in range(20_000)]
    lengths = [length * mean * len(drawn) / sum(drawn) for length in drawn]

    def late(servers: int) -> float:
        """Of those that could be in time at all."""
        free, now, waited, count = [0.0] * servers, 0.0, 0, 0
        for length in lengths:
            now += chance.expovariate(rate)
            work = engine.prefill(length)
            start = max(now, free[0])
            heapq.heapreplace(free, start + work)
            count += work <= target
            waited += work <= target < start - now + work
        return waited / count

    told, untold = (capacity.prefill(Demand(rate, mean, 100, prompt_spread=known), engine, target, share).replicas for known in (spread, 0.0))
    assert late(told) <= 1.2 * (1 - share)
    assert late(untold) > 2 * (1 - share), "the mean length would have been enough"
    assert late(told - 2) > 1 - share, "more than are needed"


@settings(max_examples=60, deadline=None)
@given(rate=RATES, more=RATES, prompt=LENGTHS, output=OUTPUTS, ttft=TARGETS, itl=ITLS)
def test_more_requests_never_need_fewer_replicas(rate, more, prompt, output, ttft, itl):
    low, high = Demand(rate, prompt, output), Demand(rate + more, prompt, output)
    for need in (lambda d: capacity.prefill(d, ENGINE, ttft, 0.95), lambda d: capacity.decode(d, ENGINE, itl, 0.95),
                 lambda d: capacity.aggregated(d, ENGINE, ttft, itl, 0.95)):
        assert need(low).replicas <= need(high).replicas <= capacity.MOST


@settings(max_examples=60, deadline=None)
@given(rate=RATES, prompt=LENGTHS, longer=LENGTHS, ttft=TARGETS)
def test_longer_prompts_never_need_fewer_prefill_replicas(rate, prompt, longer, ttft):
    one, other = (capacity.prefill(Demand(rate, length, 100), ENGINE, ttft, 0.95).replicas for length in (prompt, prompt + longer))
    assert one <= other


@settings(max_examples=60, deadline=None)
@given(rate=RATES, prompt=LENGTHS, output=OUTPUTS, ttft=TARGETS, itl=ITLS, easier=st.floats(1.0, 5.0))
def test_an_easier_target_never_needs_more_replicas(rate, prompt, output, ttft, itl, easier):
    demand = Demand(rate, prompt, output)
    assert capacity.prefill(demand, ENGINE, ttft, 0.95).replicas >= capacity.prefill(demand, ENGINE, ttft * easier, 0.95).replicas
    assert capacity.prefill(demand, ENGINE, ttft, 0.95).replicas >= capacity.prefill(demand, ENGINE, ttft, 0.8).replicas
    assert capacity.decode(demand, ENGINE, itl, 0.95).replicas >= capacity.decode(demand, ENGINE, itl, 0.8).replicas


def test_no_load_needs_nobody_and_any_load_needs_somebody():
    for need in (capacity.prefill(Demand(0, 100, 100), ENGINE, 0.5, 0.95), capacity.decode(Demand(0, 100, 100), ENGINE, 0.02, 0.95),
                 capacity.aggregated(Demand(0, 100, 100), ENGINE, 0.5, 0.02, 0.95)):
        assert need.replicas == 0
    assert capacity.aggregated(Demand(0.001, 100, 100), ENGINE, 0.5, 0.02, 0.95).replicas == 1


def test_what_the_cache_holds_needs_no_prefill():
    cold, warm = Demand(50, 8000, 100), Demand(50, 8000, 100, cached_share=0.8)
    assert capacity.prefill(warm, ENGINE, 0.5, 0.95).replicas < capacity.prefill(cold, ENGINE, 0.5, 0.95).replicas


def test_a_target_that_no_replica_meets_is_said_and_the_queue_is_kept_short():
    need = capacity.prefill(Demand(10, 8000, 100), ENGINE, 0.05, 0.95)
    assert "one alone takes longer than the target of 50 ms" in need.why
    assert capacity.waiting(need.replicas, 10 * ENGINE.prefill(8000)) <= 0.05
    assert "even one sequence" in capacity.decode(Demand(10, 8000, 100), ENGINE, 0.001, 0.95).why


def test_a_replica_decodes_as_many_as_keep_the_target_and_fit():
    most = capacity.most_concurrency(ENGINE, 1000, 0.008)
    assert ENGINE.itl(1000, most) == pytest.approx(0.008)
    assert capacity.most_concurrency(ENGINE, 1000, 10.0) == ENGINE.most_sequences(1000)
    assert capacity.most_concurrency(attrs.evolve(ENGINE, step=1.0), 1000, 0.01) == 1.0


def test_the_mean_number_leaves_room_for_chance():
    for most in (4.0, 30.0, 200.0):
        room = capacity.occupancy(most, 0.95)
        assert room + 1.6449 * math.sqrt(room) == pytest.approx(most, rel=1e-3)


def test_stretches_with_prompts_of_one_length_each_have_together_the_spread_of_all():
    parts = [Load(10.0, 10.0, rate=0.3, prompt_tokens=500.0), Load(20.0, 10.0, rate=0.1, prompt_tokens=8_000.0), Load(30.0, 10.0)]
    lengths = [500.0] * 3 + [8_000.0]
    assert merged(parts).prompt_spread == pytest.approx(statistics.pvariance(lengths) / statistics.mean(lengths) ** 2)
    assert merged(parts[:1]).prompt_spread == pytest.approx(0.0)
    assert merged([merged(parts[:1]), merged(parts[1:])]) == merged(parts)
