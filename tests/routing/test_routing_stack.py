"""Building stacks from configuration, and what a stack does with policies that break their contract (R7)."""

import asyncio
import math
import sys
import types

import attrs
import pytest

from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.errors import ConfigError
from dynamo_core.plugins import Component, Plugin, Plugins
from dynamo_core.routing import facts, filters, scorers
from dynamo_core.routing.contract import Dice, Fact, RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack, said
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints

ODD: Fact[int] = Fact("acme.odd", int)
REQUEST = RoutingRequest("r", "m", (), 100)
WORKERS = tuple(Worker(i + 1) for i in range(4))
COLUMNS = {facts.IN_FLIGHT: (3, 1, 2, 0), facts.BOOKED_BLOCKS: (0, 0, 0, 0), facts.TURN: (4, 3, 2, 1)}


@attrs.frozen
class NeedsOdd:
    needs = (ODD,)

    def score(self, request, fleet):
        return [1.0] * len(fleet)


@attrs.frozen
class NeedsTypo:
    needs = (Fact("bookings.in_flihgt", int),)

    def score(self, request, fleet):
        return [1.0] * len(fleet)


@attrs.frozen
class Lacking:
    needs = ()


@attrs.frozen
class Whole:
    needs = (facts.IN_FLIGHT,)

    def choose(self, request, fleet, dice):
        return len(fleet) - 1, [0.0] * len(fleet)


@attrs.frozen
class OddPreset:
    def stack(self):
        return {"scorers": ["turn", {"use": "load", "weight": 3}], "picker": "uniform", "facts": [{"use": "odd"}], "colour": "blue"}


@attrs.define
class OddFacts:
    provides = (ODD,)
    step: int = 2

    def columns(self, request, workers):
        return {ODD: tuple(range(0, self.step * len(workers), self.step))}


def plugins(*extra):
    """The built-ins, and components of this module as if a plugin had registered them."""
    found = Plugins.load()
    acme = Plugin("acme", "1.0", "dynamo-acme")
    more = {(kind, name): Component(kind, name, target if ":" in target else f"acme_routing:{target}", acme) for kind, name, target in extra}
    return attrs.evolve(found, components={**found.components, **more})


@pytest.fixture(autouse=True)
def acme(monkeypatch):
    module = types.ModuleType("acme_routing")
    for cls in (NeedsOdd, NeedsTypo, Lacking, Whole, OddPreset, OddFacts):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "acme_routing", module)


def names(parts):
    return [part.name for part in parts]


def why(router, *extra):
    with pytest.raises(ConfigError) as error:
        build_stack(router, plugins(*extra))
    return str(error.value)


# ------------------------------------------------------------------ building


def test_without_configuration_it_is_round_robin_behind_the_safety_filters():
    stack = build_stack(RouterConfig(), plugins())
    assert names(stack.filters) == ["ready", "not-failed", "pinned", "taints"]
    assert names(stack.scorers) == ["turn"]
    assert stack.hash == build_stack(RouterConfig(use=Use("round-robin")), plugins()).hash


@pytest.mark.parametrize("preset", ["round-robin", "random", "least-loaded", "power-of-two", "direct"])
def test_every_preset_builds_and_chooses(preset):
    stack = build_stack(RouterConfig(use=Use(preset)), plugins())
    assert {"ready", "not-failed", "pinned", "taints"} <= set(names(stack.filters))
    assert stack.describe()["filters"]


def test_safety_filters_come_first_unless_named_elsewhere():
    stack = build_stack(RouterConfig(filters=(Use("taints"), Use("ready")), scorers=(Use("load"),)), plugins())
    assert names(stack.filters) == ["not-failed", "pinned", "taints", "ready"]


def test_filters_may_be_added_to_a_preset_but_not_scorers():
    stack = build_stack(RouterConfig(use=Use("least-loaded"), filters=(Use("not-full", {"limit": 0.5}),)), plugins())
    assert names(stack.filters) == ["ready", "not-failed", "pinned", "taints", "not-full"]
    assert set(names(stack.providers)) == {"facts.fleet", "facts.bookings", "facts.engine-load"}
    assert "names the policy 'least-loaded', which brings its own, and scorers" in why(RouterConfig(use=Use("least-loaded"), scorers=(Use("turn"),)))


def test_temperature_is_short_for_softmax():
    short = build_stack(RouterConfig(scorers=(Use("load"),), temperature=0.2), plugins())
    long = build_stack(RouterConfig(scorers=(Use("load"),), picker=Use("softmax", {"temperature": 0.2})), plugins())
    assert short.hash == long.hash
    assert "temperature" in why(RouterConfig(picker=Use("uniform"), temperature=0.2))
    assert "the picker 'power-of-two' does not use" in why(RouterConfig(use=Use("power-of-two"), temperature=0.2))


def test_a_roles_table_replaces_the_common_one():
    router = RouterConfig(use=Use("random"), decode=RouterConfig(use=Use("least-loaded")))
    assert names(build_stack(router, plugins(), role="decode").scorers) == ["load"]
    assert names(build_stack(router, plugins(), role="prefill").scorers) == []


def test_two_scorers_of_one_name_are_told_apart():
    stack = build_stack(RouterConfig(scorers=(Use("load"), Use("load", weight=2.0))), plugins())
    assert [(part.name, part.weight) for part in stack.scorers] == [("load", 1.0), ("load#2", 2.0)]


def test_a_preset_of_a_plugin_is_a_table_and_its_mistakes_are_named():
    assert "its stack has unknown keys: colour" in why(RouterConfig(use=Use("odd")), ("policy", "odd", "OddPreset"), ("facts", "odd", "OddFacts"))


def test_a_whole_policy_takes_the_place_of_scorers_and_picker_and_keeps_the_filters():
    stack = build_stack(RouterConfig(use=Use("whole")), plugins(("policy", "whole", "Whole")))
    assert names(stack.filters) == ["ready", "not-failed", "pinned", "taints"]
    assert facts.IN_FLIGHT in stack.needs
    columns = dict.fromkeys(facts.ALL, (0,) * 4) | {facts.PROVEN: (True,) * 4, facts.DRAINING: (False,) * 3 + (True,)}
    assert stack.decide(REQUEST, WORKERS, columns, Dice(1)).worker == WORKERS[2]


def test_a_needed_fact_is_provided_by_whoever_offers_it():
    stack = build_stack(RouterConfig(scorers=(Use("odd"),)), plugins(("scorer", "odd", "NeedsOdd"), ("facts", "odd", "OddFacts")))
    assert "facts.odd" in names(stack.providers)


def test_options_of_a_provider_come_from_the_configuration():
    router = RouterConfig(scorers=(Use("odd"),), facts=(Use("odd", {"step": 5}),))
    stack = build_stack(router, plugins(("scorer", "odd", "NeedsOdd"), ("facts", "odd", "OddFacts")))
    assert [part.component.step for part in stack.providers if part.use == "odd"] == [5]


def test_a_fact_that_nobody_provides_names_policy_fact_and_remedy():
    text = why(RouterConfig(scorers=(Use("odd", where="stack.toml:7"), Use("typo"))), ("scorer", "odd", "NeedsOdd"), ("scorer", "typo", "NeedsTypo"))
    assert "stack.toml:7: scorer 'odd' needs the fact 'acme.odd', and nothing in this stack provides it" in text
    assert "facts that are provided: " in text
    assert "bookings.blocks" in text
    assert "did you mean 'bookings.in_flight'?" in text


def test_a_provider_that_does_not_import_is_named_when_its_fact_is_missing():
    text = why(RouterConfig(scorers=(Use("odd"),)), ("scorer", "odd", "NeedsOdd"), ("facts", "broken", "no_such_module:Facts"))
    assert "some providers could not be asked" in text
    assert "dynamo-acme 1.0" in text


def test_a_provider_of_another_plugin_is_not_imported_without_need():
    build_stack(RouterConfig(), plugins(("facts", "broken", "no_such_module:Facts")))


def test_every_problem_is_reported_at_once():
    text = why(RouterConfig(filters=(Use("reddy"),), scorers=(Use("lood"), Use("lacking"))), ("scorer", "lacking", "Lacking"))
    assert "did you mean 'ready'" in text
    assert "did you mean 'load'" in text
    assert "scorer 'lacking' lacks `score`" in text


def test_the_hash_changes_with_any_option_or_weight_and_with_nothing_else():
    def digest(**router):
        return build_stack(RouterConfig(**router), plugins()).hash

    base = digest(scorers=(Use("load"),), filters=(Use("not-full"),))
    assert base == digest(scorers=(Use("load"),), filters=(Use("not-full", {"limit": 0.95}),), seed=9, decisions=7)
    assert base != digest(scorers=(Use("load", weight=2.0),), filters=(Use("not-full"),))
    assert base != digest(scorers=(Use("load"),), filters=(Use("not-full", {"limit": 0.9}),))


# ------------------------------------------------------------------ R7


class Rude:
    needs = (facts.IN_FLIGHT,)

    def __init__(self, answer):
        self.answer = answer

    def reject(self, request, fleet):
        return self.answer(fleet)

    score = reject

    def pick(self, totals, fleet, dice):
        dice.below(7)
        return self.answer(fleet)

    def choose(self, request, fleet, dice):
        return self.answer(fleet)


def boom(fleet):
    raise KeyError("boom")


def leaves(fleet):
    sys.exit(3)


def cancels(fleet):
    raise asyncio.CancelledError


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def mute(fleet):
    raise Mute


def writes(fleet):
    fleet[facts.IN_FLIGHT][0] = 7
    return [1.0] * len(fleet)


def writes_the_table(fleet):
    fleet.columns[facts.IN_FLIGHT] = (0,) * len(fleet)
    return [1.0] * len(fleet)


def reads_undeclared(fleet):
    return fleet[facts.TURN]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (boom, "KeyError"),
        (leaves, "SystemExit: 3"),
        (cancels, "CancelledError"),
        (mute, "Mute"),
        (lambda fleet: [1.0], "1 scores for 4 workers"),
        (lambda fleet: [1.0, math.nan, 1.0, 1.0], "the score of row 1 is nan"),
        (lambda fleet: [1.0, 1.0, math.inf, 1.0], "the score of row 2 is inf"),
        (lambda fleet: None, "TypeError"),
        (lambda fleet: ["a"] * 4, "ValueError"),
        (lambda fleet: [10**400] * 4, "OverflowError"),
        (writes, "TypeError"),
        (writes_the_table, "TypeError"),
        (reads_undeclared, "without listing it in `needs`"),
    ],
)
def test_r7_a_scorer_that_breaks_the_contract_is_skipped_and_named(answer, said):
    stack = Stack((), (Part("scorer", "rude", Rude(answer), weight=100.0), Part("scorer", "load", scorers.LeastLoad())))
    choice = stack.decide(REQUEST, WORKERS, COLUMNS, Dice(1))
    assert choice.worker == WORKERS[3]
    assert list(choice.scores) == ["load"]
    ((name, what),) = choice.faults
    assert name == "rude"
    assert said in what


@pytest.mark.parametrize("answer", [boom, leaves, mute, lambda f: None, lambda f: [0], lambda f: {9: "no"}, lambda f: {-1: "no"}, lambda f: {"a": "b"}, writes])
def test_r7_a_filter_that_breaks_the_contract_is_skipped_and_named(answer):
    stack = Stack((Part("filter", "rude", Rude(answer)), Part("filter", "not-failed", filters.NotFailed())), (Part("scorer", "load", scorers.LeastLoad()),))
    choice = stack.decide(attrs.evolve(REQUEST, failed=(WORKERS[3],)), WORKERS, COLUMNS, Dice(1))
    assert choice.worker == WORKERS[1]
    assert [name for name, _ in choice.faults] == ["rude"]
    assert choice.rejected == [(3, "not-failed", "it failed this request before")]


@pytest.mark.parametrize("answer", [boom, leaves, mute, lambda f: None, lambda f: 4, lambda f: -1, lambda f: 0.5])
def test_r7_a_picker_that_breaks_the_contract_gives_way_to_the_best(answer):
    stack = Stack((), (Part("scorer", "load", scorers.LeastLoad()),), Part("picker", "rude", Rude(answer)))
    choice = stack.decide(REQUEST, WORKERS, COLUMNS, Dice(1))
    assert choice.worker == WORKERS[3]
    assert [name for name, _ in choice.faults] == ["rude"]


@pytest.mark.parametrize("answer", [boom, leaves, mute, lambda f: None, lambda f: (9, [0.0] * 4), lambda f: (0, [0.0]), lambda f: (0, [math.nan] * 4)])
def test_r7_a_whole_policy_that_breaks_the_contract_gives_way_to_chance(answer):
    stack = Stack(policy=Part("policy", "rude", Rude(answer)))
    choices = [stack.decide(REQUEST, WORKERS, COLUMNS, Dice(seed)) for seed in range(100)]
    assert {choice.worker for choice in choices} == set(WORKERS)
    assert [name for name, _ in choices[0].faults] == ["rude"]


def test_r7_a_policy_whose_facts_are_missing_is_skipped_and_named():
    stack = Stack((), (Part("scorer", "odd", NeedsOdd()), Part("scorer", "load", scorers.LeastLoad())))
    choice = stack.decide(REQUEST, WORKERS, COLUMNS, Dice(1))
    assert choice.worker == WORKERS[3]
    assert choice.faults == [("odd", "nobody provided acme.odd for this decision")]


def test_ctrl_c_is_not_a_fault_of_the_policy_that_it_meets():
    def interrupted(fleet):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stack((), (Part("scorer", "load", Rude(interrupted)),)).decide(REQUEST, WORKERS, COLUMNS, Dice(1))


def test_unit_scores_are_clamped_and_raw_scores_are_not():
    far = Rude(lambda fleet: [-5.0, 0.5, 2.0, 1.0])
    raw = Rude(lambda fleet: [-5.0, 0.5, 2.0, 1.0])
    raw.scale = "raw"
    assert list(Stack((), (Part("scorer", "far", far),)).decide(REQUEST, WORKERS, COLUMNS, Dice(1)).totals) == [0.0, 0.5, 1.0, 1.0]
    assert list(Stack((), (Part("scorer", "raw", raw),)).decide(REQUEST, WORKERS, COLUMNS, Dice(1)).totals) == [-5.0, 0.5, 2.0, 1.0]


def test_a_raw_score_that_overflows_with_its_weight_is_skipped():
    raw = Rude(lambda fleet: [1e308] * len(fleet))
    raw.scale = "raw"
    choice = Stack((), (Part("scorer", "raw", raw, weight=1e10),)).decide(REQUEST, WORKERS, COLUMNS, Dice(1))
    assert choice.worker in WORKERS
    assert choice.faults[0][0] == "raw"


def test_each_rejected_worker_has_one_reason_and_one_author():
    stack = Stack((Part("filter", "not-failed", filters.NotFailed()), Part("filter", "pinned", filters.Pinned())))
    request = attrs.evolve(REQUEST, failed=(WORKERS[0],), hints=Hints(instance=1))
    choice = stack.decide(request, WORKERS, {}, Dice(1))
    assert choice.worker is None
    assert [(row, by) for row, by, _ in choice.rejected] == [(0, "not-failed"), (1, "pinned"), (2, "pinned"), (3, "pinned")]


def test_an_exception_takes_one_line_whatever_it_says():
    assert said(RuntimeError("boom\n  at line 2")) == "RuntimeError: boom at line 2"
