"""The scheduler, step by step: who gets the budget, who gives way, and that nothing is ever lost or changed by it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_sim.scheduler import Limits, Scheduler, Sequence, Step
from dynamo_sim.timing import Fixed, Linear, Polynomial
from dynamo_sim.vocabulary import built_in

WORDS = built_in().answers


def scheduler(**limits: Any) -> Scheduler:
    return Scheduler(Limits(**{"total_blocks": 64, "block_size": 4, **limits}), Fixed(10.0), WORDS)


def sequence(length: int, count: int = 4, first: int = 0, **about: Any) -> Sequence:
    return Sequence(list(range(first, first + length)), count, 0, **about)


def run(scheduler: Scheduler, *sequences: Sequence) -> list[Step]:
    for each in sequences:
        scheduler.add(each)
    steps: list[Step] = []
    while not scheduler.idle:
        steps.append(scheduler.step())
        assert len(steps) < 10_000, "it goes round in circles"
        assert scheduler.pool.cached + scheduler.pool.private <= scheduler.limits.total_blocks
    return steps


def test_each_step_gives_every_running_sequence_one_token() -> None:
    steps = run(scheduler(), sequence(5, 3), sequence(6, 3))
    assert [len(step.tokens) for step in steps] == [2, 2, 2]
    assert [step.prefill_tokens for step in steps] == [11, 0, 0]


def test_a_long_prompt_is_read_in_chunks_beside_those_that_decode() -> None:
    s = scheduler(max_batched_tokens=8)
    short, long = sequence(2, 10), sequence(20, 1, first=100)
    s.add(short)
    s.step()
    s.add(long)
    steps = [s.step() for _ in range(3)]
    assert [step.prefill_tokens for step in steps] == [7, 7, 6]
    assert [len(step.tokens) for step in steps] == [1, 1, 2]


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    s = scheduler(max_batched_tokens=8, chunked_prefill=False)
    s.add(sequence(5, 1))
    s.add(sequence(6, 1, first=100))
    assert [s.step().prefill_tokens, s.step().prefill_tokens] == [5, 6]


def test_no_more_sequences_run_than_allowed() -> None:
    s = scheduler(max_sequences=2)
    for i in range(5):
        s.add(sequence(3, 2, first=10 * i))
    s.step()
    assert (s.load().running, s.load().waiting, s.load().waiting_prefill_tokens) == (2, 3, 9)


@pytest.mark.parametrize(("policy", "loser"), [("lifo", 1), ("fifo", 0)])
def test_when_blocks_run_out_the_newest_or_the_oldest_gives_way(policy: str, loser: int) -> None:
    s = scheduler(total_blocks=6, preemption=policy)
    both = [sequence(8, 12), sequence(8, 12, first=100)]
    steps = run(s, *both)
    assert sum(step.preempted for step in steps) >= 1
    assert both[loser].preemptions >= 1
    assert both[1 - loser].preemptions == 0
    assert [len(each.generated) for each in both] == [12, 12]


def test_cancelling_frees_at_once_wherever_the_sequence_is() -> None:
    s = scheduler(max_sequences=2, max_batched_tokens=8)
    decoding, reading, waiting = sequence(3, 50), sequence(30, 5, first=100), sequence(3, 5, first=200)
    for each in (decoding, reading, waiting):
        s.add(each)
    s.step()
    for each in (reading, waiting, decoding, decoding):
        s.cancel(each)
    assert s.idle
    assert s.pool.used == 0
    assert s.load().waiting_prefill_tokens == 0


def test_an_empty_step_takes_no_time() -> None:
    step = scheduler().step()
    assert (step.duration_ms, step.tokens, step.events) == (0.0, [], [])


def test_what_can_never_run_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="do not fit in 64 blocks of 4"):
        scheduler().add(sequence(250, 7))
    with pytest.raises(ValueError, match="chunked prefill is off"):
        scheduler(chunked_prefill=False, max_batched_tokens=16).add(sequence(14, 3))


def test_a_sequence_that_stops_on_its_last_token_names_the_stop() -> None:
    free = sequence(3, 4)
    run(scheduler(), free)
    stopped = sequence(3, 4, stop_ids=frozenset({free.generated[3]}))
    run(scheduler(), stopped)
    assert (stopped.finish_reason, stopped.stop_reason, stopped.generated) == ("stop", free.generated[3], free.generated)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 3), st.integers(0, 12)), min_size=1, max_size=8),
    st.sampled_from(["lifo", "fifo"]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(16, 24),
    st.integers(1, 80),
)
@settings(max_examples=80, deadline=None)
def test_pressure_changes_when_tokens_come_and_never_which(
    work: list[tuple[int, int, int, int]], preemption: str, caching: bool, sequences: int, blocks: int, budget: int
) -> None:
    s = scheduler(total_blocks=blocks, preemption=preemption, prefix_caching=caching, max_sequences=sequences, max_batched_tokens=budget)
    waiting = sorted(((arrival, sequence(length, count, first)) for length, count, first, arrival in work), key=lambda item: item[0])
    every = [each for _, each in waiting]
    now = 0
    tokens: dict[int, list[int]] = {id(each): [] for each in every}
    while waiting or not s.idle:
        while waiting and waiting[0][0] <= now:
            s.add(waiting.pop(0)[1])
        step = s.step()
        for each, token in zip(step.sequences, step.tokens, strict=True):
            tokens[id(each)].append(token)
        now += 1
        assert now < 5000, "it goes round in circles"
        assert s.pool.cached + s.pool.private <= blocks
    assert s.pool.used == 0
    for each in every:
        alone = sequence(len(each.prompt), len(each.generated), each.prompt[0])
        run(scheduler(), alone)
        assert tokens[id(each)] == each.generated == alone.generated
        assert each.finish_reason == "length"


def test_the_default_timing_has_the_published_values() -> None:
    timing = Polynomial(16384)
    assert timing.step_ms(1000, 0, 0) == pytest.approx(4.209989e-7 * 1e6 + 15.18344 + 16.50142)
    assert timing.step_ms(0, 5, 0) == pytest.approx(5.74)
    assert timing.step_ms(0, 5, 8192) == pytest.approx(-25.74 / 4 + 54.01 / 2 + 5.74)
    assert timing.step_ms(1000, 5, 0) == pytest.approx(timing.step_ms(1000, 0, 0) + 5.74)


def test_the_linear_timing_adds_up() -> None:
    timing = Linear(step=5, prefill_token=0.5, decode=0.25, used_block=0.125)
    assert timing.step_ms(10, 0, 8) == 10.0
    assert timing.step_ms(0, 4, 8) == 7.0
