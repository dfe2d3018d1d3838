"""Providers of facts that break, lie or change what they have said: it costs their facts, and no request."""

import numpy as np
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import Fact, RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Instance

PLUGINS = Plugins.load()
ODD: Fact[int] = Fact("acme.odd", int)


def in_turn():
    return build_stack(RouterConfig(use=Use("round-robin")), PLUGINS)


def fleet_of_three(stack, **options):
    router = Router("m", stack, **options)
    for i in (1, 2, 3):
        router.joined(Worker(i), Instance(id=i, namespace="n", component="c", endpoint="e", address="a"), ModelCard(name="m"))
        router.proven(Worker(i))
    return router


def request(i=0):
    return RoutingRequest(f"r{i}", "m", list(range(100)))


class Prefers:
    needs = (ODD,)

    def score(self, request, fleet):
        return [x / 100 for x in fleet[ODD]]


class Odd:
    provides = (ODD,)

    def __init__(self, answer):
        self.answer = answer

    def columns(self, request, workers):
        return {ODD: self.answer(workers)}

    def booked(self, request, worker, overlap_tokens):
        raise RuntimeError("booked")

    def first_token(self, request_id, worker, cached_tokens): ...

    def grew(self, request_id, worker, output_tokens): ...

    def finished(self, request_id, worker, outcome): ...


def fails(workers):
    raise OSError("the index is gone")


def leaves(workers):
    raise SystemExit(3)


@pytest.mark.parametrize("answer", [fails, leaves, lambda workers: (1,), lambda workers: None, lambda workers: 7])
def test_a_provider_that_breaks_costs_its_facts_and_no_request(answer):
    seen = []

    class Watcher:
        def decided(self, decision, seconds):
            seen.append((decision.worker, seconds >= 0))

        def fault(self, component, what):
            seen.append(component)

    base = in_turn()
    broken = Stack(base.filters, (Part("scorer", "prefers", Prefers()), *base.scorers), None, None, (*base.providers, Part("facts", "odd", Odd(answer))))
    router = fleet_of_three(broken, observer=Watcher())
    chosen = set()
    for i in range(3):
        decision = router.route(request(i))
        router.booked(request(i), decision.worker, decision.overlap_tokens)
        chosen.add(decision.worker.instance)
    assert chosen == {1, 2, 3}
    assert router.faults == {"odd": 6, "prefers": 3}
    assert seen.count("odd") == 6
    assert router.ring.get("r2").faults == [("prefers", "nobody provided acme.odd for this decision")]


def test_lists_and_arrays_of_a_provider_are_sealed_before_policies_see_them():
    for kind in (list, np.array):
        base = in_turn()
        odd = Part("facts", "odd", Odd(lambda workers, kind=kind: kind([10, 90, 20])))
        router = fleet_of_three(Stack(base.filters, (Part("scorer", "prefers", Prefers()),), None, None, (*base.providers, odd)))
        decision = router.route(request())
        assert decision.worker == Worker(2)
        with pytest.raises((TypeError, ValueError)):
            decision.columns[ODD][0] = 1
