"""Prompts that another worker has read: what is fetched is not computed, and everything else stays as it is."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dynamo_sim.scheduler import Limits, Scheduler, Sequence
from dynamo_sim.timing import Fixed
from dynamo_sim.vocabulary import built_in


def scheduler(**limits: Any) -> Scheduler:
    return Scheduler(Limits(**{"total_blocks": 64, "block_size": 4, **limits}), Fixed(10.0), built_in().answers)


def run(scheduler: Scheduler, *sequences: Sequence) -> list[int]:
    """Prompt tokens that each step computed."""
    for sequence in sequences:
        scheduler.add(sequence)
    prefills: list[int] = []
    while not scheduler.idle:
        prefills.append(scheduler.step().prefill_tokens)
    return prefills


def test_a_fetched_prompt_costs_one_token_of_work() -> None:
    assert run(scheduler(), Sequence(list(range(21)), 2, 0, fetched=20))[0] == 1
    assert run(scheduler(), Sequence(list(range(21)), 2, 0))[0] == 21


def test_fetched_blocks_are_cached_for_the_next_prompt() -> None:
    s = scheduler()
    run(s, Sequence(list(range(21)), 1, 0, fetched=20))
    again = Sequence(list(range(21)), 1, 0)
    assert run(s, again)[0] == 1
    assert again.cached_tokens == 20


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 80))
def test_fetching_changes_no_token_and_leaves_no_block(length: int, count: int, fetched: int) -> None:
    s = scheduler()
    one, other = Sequence(list(range(length)), count, 7), Sequence(list(range(length)), count, 7, fetched=min(fetched, length - 1))
    run(scheduler(), one)
    run(s, other)
    assert one.generated == other.generated
    assert s.pool.private == 0


def test_a_preempted_sequence_computes_what_it_had_fetched() -> None:
    s = scheduler(total_blocks=8, prefix_caching=False)
    sequences = [Sequence([100 * i + j for j in range(13)], 12, 0, fetched=12) for i in range(2)]
    assert max(run(s, *sequences)) >= 13
    assert sum(sequence.preemptions for sequence in sequences) > 0
    assert all(len(sequence.generated) == 12 for sequence in sequences)
