"""Shadows stop by themselves; regret has a cause."""

from __future__ import annotations

import itertools
import threading
import time

import attrs
import pytest

from dynamo_core.routing.contract import Dice, Fleet, RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.record import Decision
from dynamo_core.routing.regret import regret_of, stale_tokens
from dynamo_core.routing.shadow import BACKLOG, Beside, Shadow


def decision(overlaps=(100, 0, 50), chosen=1, totals=(1.0, 2.0, 0.5), rejected=(), candidates=(0, 1, 2)) -> Decision:
    workers = tuple(Worker(i) for i in range(len(overlaps)))
    return Decision("d", RoutingRequest("r", "m", prompt_tokens=200), workers[chosen], workers, tuple(map(str, workers)), {OVERLAP_TOKENS: tuple(overlaps)},
                    list(rejected), list(candidates), {}, list(totals), [], 1, "s", 1, 0.0)


@pytest.mark.parametrize(("record", "expected"), [
    (decision(chosen=0), (0, "none")),
    (decision(), (100, "load")),
    (decision(totals=(2.0, 2.0, 0.5)), (100, "tie")),
    (decision(totals=(3.0, 2.0, 0.5)), (100, "chance")),
    (decision(rejected=[(0, "kv-busy", "full")], candidates=(1, 2), totals=(2.0, 0.5)), (100, "filter")),
    (decision(rejected=[(0, "session", "bound")], candidates=(1, 2), totals=(2.0, 0.5)), (100, "affinity")),
    (decision((100, 0, 100), rejected=[(0, "kv-busy", "full")], candidates=(1, 2), totals=(2.0, 0.5)), (100, "load")),
    (decision((100, 0, 100), totals=(1.0, 2.0, 2.0)), (100, "tie")),
])
def test_cached_tokens_that_were_passed_by_have_a_cause(record, expected):
    assert regret_of(record) == expected


def test_tokens_that_were_believed_in_and_not_there_are_stale():
    assert stale_tokens(decision(chosen=0), 30) == 70
    assert stale_tokens(decision(chosen=0), 100) == stale_tokens(decision(chosen=0), None) == 0


@attrs.frozen
class Odd:
    what: str = "raise"
    needs = (OVERLAP_TOKENS,)

    def score(self, request: RoutingRequest, fleet: Fleet):
        if self.what == "raise":
            raise RuntimeError("no")
        if self.what == "write":
            fleet[OVERLAP_TOKENS][0] = 5  # type: ignore[index]
        return [float("nan")] * len(fleet)

    def pick(self, totals, fleet: Fleet, dice: Dice) -> int:
        return 0


@pytest.mark.parametrize("what", ["raise", "nan", "write"])
def test_a_shadow_that_breaks_its_contract_again_and_again_is_stopped(what):
    shadow, record = Shadow(Stack(scorers=(Part("scorer", "odd", Odd(what)),))), decision()
    for _ in range(10):
        shadow.follow(record)
    assert "5 times in a row" in shadow.stopped
    assert record.columns[OVERLAP_TOKENS] == (100, 0, 50)


def test_a_shadow_that_costs_too_much_is_stopped():
    ticks = itertools.count(0.0, 0.02)
    shadow = Shadow(Stack(), clock=lambda: next(ticks), cpu=lambda: next(ticks))
    for _ in range(20):
        shadow.follow(decision())
    assert "its budget is 1.0%" in shadow.stopped
    assert shadow.seen < 10


def test_a_shadow_sees_the_share_that_it_was_given():
    shadow = Shadow(Stack(), sample=0.25, budget=1.0)
    for seed in range(2000):
        shadow.follow(attrs.evolve(decision(), seed=seed))
    assert 400 < shadow.seen < 600


@attrs.frozen
class Waits:
    """A scorer that does not come back before somebody lets it."""

    gate: threading.Event
    needs = ()

    def score(self, request: RoutingRequest, fleet: Fleet):
        self.gate.wait(30)
        return [0.0] * len(fleet)


def test_nobody_waits_for_a_shadow_that_does_not_come_back_and_it_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dynamo_core.routing.shadow.STUCK", 0.05)
    gate, verdicts = threading.Event(), list[str]()
    shadow = Shadow(Stack(scorers=(Part("scorer", "waits", Waits(gate)),)), budget=1.0)
    beside = Beside(shadow, verdicts.append)
    deadline = time.monotonic() + 20
    while not shadow.stopped and time.monotonic() < deadline:
        beside.follow(decision())
        time.sleep(0.001)
    assert shadow.stopped.startswith("it has been at one decision for more than")
    assert set(verdicts) <= {"skipped"}
    gate.set()


def test_a_shadow_that_falls_behind_skips_decisions_and_says_so():
    gate, verdicts = threading.Event(), list[str]()
    beside = Beside(Shadow(Stack(scorers=(Part("scorer", "waits", Waits(gate)),)), budget=1.0), verdicts.append)
    for _ in range(BACKLOG + 10):
        beside.follow(decision())
    assert 9 <= verdicts.count("skipped") <= 10
    gate.set()
    beside.close()


def test_a_decision_without_a_part_that_broke_is_not_compared():
    shadow = Shadow(Stack(scorers=(Part("scorer", "odd", Odd("raise")),)))
    comparison = shadow.follow(decision())
    assert comparison is not None
    assert comparison.verdict == "failed"
    assert (shadow.same, shadow.other) == (0, 0)
