"""Rates of pools are learned from what requests met, and say how far off they are."""

from __future__ import annotations

import random

import pytest

from dynamo_global_router.rates import Line, Speed, Workload
from dynamo_global_router.settings import Rates


def test_a_line_finds_the_line_behind_its_samples() -> None:
    rng = random.Random(1)
    line = Line(100.0, 1.0, 4.0)
    for _ in range(300):
        x = rng.uniform(0, 8)
        line.learn(x, (20 + 15 * x) * rng.uniform(0.95, 1.05))
    assert line.base == pytest.approx(20, rel=0.1)
    assert line.slope == pytest.approx(15, rel=0.1)
    assert 0.0 < line.error < 0.1


def test_samples_that_are_all_alike_still_give_the_right_answer_where_they_are() -> None:
    line = Line(20.0, 20.0, 4.0)
    for _ in range(50):
        line.learn(2.0, 300.0)
    assert line.at(2.0) == pytest.approx(300.0, rel=0.05)
    assert line.at(0.0) >= 0


def test_what_has_changed_is_learned_anew() -> None:
    rng = random.Random(2)
    line = Line(20.0, 20.0, 4.0)
    for speed in (1.0, 3.0):
        for _ in range(500):
            x = rng.uniform(0, 8)
            line.learn(x, speed * (20 + 15 * x))
    assert line.at(4.0) == pytest.approx(3 * 80, rel=0.1)


def test_neither_part_of_a_line_falls_below_zero() -> None:
    falling, steep = Line(10.0, 1.0, 4.0), Line(10.0, 1.0, 4.0)
    for x in range(1, 9):
        falling.learn(x, 100.0 - 10 * x)
        steep.learn(x, 100.0 * x - 90)
    assert falling.slope == 0.0
    assert falling.base > 0
    assert steep.base == 0.0
    assert steep.slope > 0


def test_one_pause_does_not_spoil_what_was_learned() -> None:
    line = Line(20.0, 20.0, 4.0)
    for _ in range(100):
        line.learn(1.0, 40.0)
    line.learn(1.0, 40_000.0)
    assert line.at(1.0) < 45.0


def test_backlog_and_neighbours_and_a_full_worker_make_a_request_slower() -> None:
    speed = Speed(Rates(prefill_ms=10, prefill_ms_per_1000=100, itl_ms=5, itl_ms_per_sequence=1))
    alone = speed.estimate(Workload(1000, 0, 4), None, 0.0)
    behind = speed.estimate(Workload(5000, 0, 4), None, 0.0)
    crowded = speed.estimate(Workload(1000, 3, 4), None, 0.0)
    full = speed.estimate(Workload(1000, 8, 4), 100, 0.0)
    assert (alone.ttft_ms, alone.itl_ms) == (pytest.approx(110), pytest.approx(5))
    assert behind.ttft_ms == pytest.approx(510)
    assert (crowded.ttft_ms, crowded.itl_ms) == (pytest.approx(110), pytest.approx(8))
    # Five too many; one of four ends every 100 tokens of 13 ms.
    assert full.ttft_ms == pytest.approx(110 + 5 * 100 * 13 / 4)


def test_rates_that_are_to_hold_do_not_change_and_do_not_age() -> None:
    speed = Speed(Rates(prefill_ms=10, prefill_ms_per_1000=100, learn=False))
    before = speed.estimate(Workload(1000, 0), None, 1e9)
    speed.first_token(Workload(1000, 0), 5000.0)
    speed.between_tokens(0, 500.0)
    assert speed.estimate(Workload(1000, 0), None, 1e9) == before
    assert before.age_s == 0.0


def test_who_had_to_wait_for_a_place_teaches_nothing_about_prefill() -> None:
    speed = Speed(Rates())
    speed.first_token(Workload(1000, 4, 4), 60_000.0)
    assert speed.ttft.samples == 0
