"""A policy that is slow again and again is left out for a while, counted under its name; a replay of the record leaves it out, too."""

from __future__ import annotations

import time

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import Fleet, RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.patience import Patience
from dynamo_core.routing.router import Router
from dynamo_core.types import Instance


@attrs.define
class Sleepy:
    seconds: float
    asked: int = 0
    needs = ()

    def score(self, request: RoutingRequest, fleet: Fleet) -> list[float]:
        self.asked += 1
        time.sleep(self.seconds)
        return [1.0, *[0.0] * (len(fleet) - 1)]


def test_a_slow_scorer_is_left_out_for_a_while_and_counted():
    now = [0.0]
    sleepy = Sleepy(0.55)
    router = Router("m", Stack(scorers=(Part("scorer", "sleepy", sleepy),)), clock=lambda: now[0])
    router.patience = Patience(budget=0.5)  # far above what a busy machine makes of a policy that does nothing
    for i in (1, 2):
        router.joined(Worker(i), Instance(id=i, namespace="n", component="c", endpoint="e", address="a"), ModelCard(name="m"))
    decisions = [router.route(RoutingRequest(f"{i}", "m")) for i in range(8)]
    assert sleepy.asked == 5
    assert router.faults["sleepy"] == 3
    assert "too slow 5 times in a row" in decisions[-1].render()
    assert decisions[-1].recompute(router.stack).worker == decisions[-1].worker
    now[0] = 11.0
    router.route(RoutingRequest("again", "m"))
    assert sleepy.asked == 6
    router.route(RoutingRequest("out", "m"))
    assert sleepy.asked == 6
    now[0] = 22.0
    sleepy.seconds = 0.0
    for i in range(3):
        router.route(RoutingRequest(f"well{i}", "m"))
    assert sleepy.asked == 9


def test_slow_now_and_then_is_no_reason():
    patience = Patience()
    for i in range(100):
        patience.note({"p": 0.02 if i % 3 else 0.001}, float(i))
    assert patience.left_out(100.0) == {}
