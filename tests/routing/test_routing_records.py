"""A record alone gives the decision again, in memory and after JSON, whatever the stack, the fleet and the dice."""

import json
import math

import attrs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_core.contracts.fleets import Case, cases
from dynamo_core.routing import facts, filters, pickers, scorers
from dynamo_core.routing.contract import Dice, Fact, RoutingRequest, Worker
from dynamo_core.routing.decide import Part, Stack
from dynamo_core.routing.record import Decision
from dynamo_core.routing.ring import Ring

SPEED: Fact[float] = Fact("acme.speed", float, "1")


class Broken:
    """Raises, or returns rubbish, depending on the request: the decision must go on and repeat."""

    needs = (facts.IN_FLIGHT,)

    def __init__(self, how):
        self.how = how

    def score(self, request, fleet):
        return {"raises": lambda: 1 / 0, "short": lambda: [1.0], "nan": lambda: [math.nan] * len(fleet), "text": lambda: "x" * len(fleet)}[self.how]()


class Speed:
    needs = (SPEED,)
    scale = "raw"

    def score(self, request, fleet):
        return np.asarray(fleet[SPEED], dtype=np.float32) * np.float32(1.1)


class WholePolicy:
    needs = (facts.IN_FLIGHT,)

    def choose(self, request, fleet, dice):
        return dice.below(len(fleet)), [-float(x) for x in fleet[facts.IN_FLIGHT]]


some_filters = st.lists(st.sampled_from([filters.Ready(), filters.NotFailed(), filters.Pinned(), filters.Taints(), filters.NotFull()]), max_size=3)
some_scorers = st.lists(
    st.tuples(st.sampled_from([scorers.Turn(), scorers.LeastLoad(), scorers.PreferredTaints(), Speed(), *map(Broken, ("raises", "short", "nan", "text"))]),
              st.floats(-3, 3)), max_size=4)
some_pickers = st.sampled_from([None, pickers.Best(), pickers.Softmax(0.3), pickers.Uniform(), pickers.PowerOfTwo()])


@st.composite
def stacks(draw):
    parts = [Part("filter", f"f{i}", f) for i, f in enumerate(draw(some_filters))]
    weighted = [Part("scorer", f"s{i}", s, weight=w) for i, (s, w) in enumerate(draw(some_scorers))]
    picker = draw(some_pickers)
    whole = Part("policy", "whole", WholePolicy()) if draw(st.integers(0, 5)) == 0 else None
    return Stack(tuple(parts), tuple(weighted), Part("picker", "p", picker) if picker else None, whole)


def record(stack, case, seed, columns=None):
    columns = case.columns if columns is None else columns
    choice = stack.decide(case.request, case.workers, columns, Dice(seed))
    labels = tuple(f"backend-{w}" for w in case.workers)
    return Decision("d-1", case.request, choice.worker, case.workers, labels, columns, choice.rejected, choice.candidates, choice.scores,
                    choice.totals, choice.faults, seed, stack.hash, 1, 1_800_000_000.25)


@settings(deadline=None, max_examples=100, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_recomputing_from_the_record_gives_the_worker_that_was_chosen(data):
    stack = data.draw(stacks())
    # Sometimes a provider failed, and its facts are missing.
    provided = [fact for fact in (*facts.ALL, SPEED) if data.draw(st.integers(0, 20))]
    case = data.draw(cases(provided))
    columns = dict(case.columns)
    if SPEED in columns and data.draw(st.booleans()):
        columns[SPEED] = np.array(columns[SPEED], dtype=np.float32)
    decision = record(stack, case, data.draw(st.integers(0, 2**64 - 1)), columns)
    line = decision.to_json()
    again = Decision.from_json(line)

    assert "\n" not in line
    assert again.to_json() == line
    for seen in (decision, again):
        choice = seen.recompute(stack)
        assert choice.worker == decision.worker
        assert choice.rejected == decision.rejected
        assert list(choice.totals) == list(decision.totals)
    assert again.render() == decision.render()
    assert decision.worker is None or decision.labels[decision.workers.index(decision.worker)] in decision.render()


def decided(rows=3, **columns):
    workers = tuple(Worker(i + 1) for i in range(rows))
    given = {facts.IN_FLIGHT: (0, 1, 2, 9)[:rows], facts.BOOKED_BLOCKS: (0,) * rows, **columns}
    stack = Stack((), (Part("scorer", "load", scorers.LeastLoad()),), None)
    choice = stack.decide(RoutingRequest("req-1", "m", (), 100), workers, given, Dice(1))
    return Decision("d-1", RoutingRequest("req-1", "m", (), 100), choice.worker, workers, tuple(f"backend-{w}" for w in workers), given, choice.rejected,
                    choice.candidates, choice.scores, choice.totals, choice.faults, 1, stack.hash, 3, 1_800_000_000.0)


def test_the_margin_is_to_the_runner_up_and_ties_are_counted():
    assert decided().margin == pytest.approx(0.5)
    assert decided().ties == 1
    tied = attrs.evolve(decided(), totals=[1.0, 1.0, 0.0])
    assert (tied.margin, tied.ties) == (0.0, 2)
    assert decided(rows=1).margin is None


def test_overlap_of_the_chosen_worker_is_read_from_the_columns():
    decision = attrs.evolve(decided(), columns={facts.OVERLAP_TOKENS: (64, 0, 0)})
    assert decision.overlap_tokens == 64
    assert decided().overlap_tokens == 0


def test_a_rendered_decision_shows_every_candidate_reason_author_margin_and_stack():
    workers = tuple(Worker(i) for i in (1, 2, 3))
    stack = Stack((Part("filter", "not-full", filters.NotFull()),), (Part("scorer", "load", scorers.LeastLoad(), weight=2.0),))
    columns = {facts.IN_FLIGHT: (1, 2, 8), facts.BOOKED_BLOCKS: (0, 0, 0), facts.MAX_SEQUENCES: (8, 8, 8), facts.ENGINE_KV_USAGE: (0.1, 0.2, 0.3),
               facts.ENGINE_REPORT_AGE: (0.5, math.inf, 2.0)}
    request = RoutingRequest("req-7", "smol", (), 812)
    choice = stack.decide(request, workers, columns, Dice(7))
    decision = Decision("d-9", request, choice.worker, workers, ("a-1", "a-2", "a-3"), columns, choice.rejected, choice.candidates, choice.scores,
                        choice.totals, [("sneaky", "ZeroDivisionError: division by zero")], 7, stack.hash, 4, 1_800_000_000.0,
                        dispatched=workers[1], outcome="done")
    text = decision.render({workers[0]: "front-row"})
    lines = text.splitlines()
    assert "chosen     front-row  margin +2" in text
    assert f"stack      {stack.hash}  generation 4" in text
    assert "served by  a-2, done" in text
    assert "age        engine.report_age: 0.5 to 2.0 s, 1 of 3 workers said nothing" in text
    assert "skipped    sneaky: ZeroDivisionError: division by zero" in text
    assert lines[-4:] == [
        "  worker     total  2 x load",
        "* front-row      2         1",
        "  a-2            0         0",
        "x a-3        not-full: 8 requests in progress of 8 sequences, limit 95%",
    ]


def test_a_decision_without_workers_says_so():
    stack = Stack()
    decision = record(stack, Case(RoutingRequest("r", "m"), (), {}, ()), 0)
    assert decision.reason == "no worker is registered"
    assert "nobody, because no worker is registered" in decision.render()
    assert Decision.from_json(decision.to_json()).recompute(stack).worker is None


@pytest.mark.parametrize("line", ["", "null", "[]", "{}", '{"id": 1}', "\x00", '{"request": {}}', b"\xff\xfe"])
def test_garbage_is_no_decision_record(line):
    with pytest.raises(ValueError):
        Decision.from_json(line)


# ------------------------------------------------------------------ the ring


def numbered(i, request="r"):
    workers = tuple(Worker(k + 1) for k in range(100))
    return attrs.evolve(decided(), id=f"d-{i}", request=RoutingRequest(request, "m"), workers=workers, columns={facts.TURN: tuple(range(1000, 1100))})


def test_the_ring_finds_by_decision_and_by_request_the_latest():
    ring = Ring(3)
    for i in range(5):
        ring.push(numbered(i, "same"))
    assert [d.id for d in ring] == ["d-2", "d-3", "d-4"]
    assert ring.get("same").id == "d-4"
    assert ring.get("d-3").id == "d-3"
    assert ring.get("d-0") is None


def test_the_ring_forgets_a_request_with_its_last_decision():
    ring = Ring(2)
    for i in range(4):
        ring.push(numbered(i, f"r{i}"))
    assert ring.get("r1") is None
    assert len(ring._by_request) == len(ring._by_id) == 2


def test_the_ring_is_bounded_by_values_too_but_keeps_the_last():
    ring = Ring(1000, cells=1000)
    for i in range(50):
        ring.push(numbered(i))
    assert 5 <= len(ring) <= 10
    ring = Ring(1000, cells=10)
    ring.push(numbered(1))
    ring.push(numbered(2))
    assert [d.id for d in ring] == ["d-2"]


def test_columns_that_records_share_are_counted_once():
    ring = Ring(1000, cells=10_000)
    still = tuple(range(5000))
    for i in range(50):
        ring.push(attrs.evolve(numbered(i), columns={facts.TAINTS: still}))
    assert len(ring) == 50


def test_a_ring_of_none_keeps_nothing():
    ring = Ring(0)
    ring.push(numbered(1))
    assert len(ring) == 0
    assert ring.get("d-1") is None


@pytest.mark.parametrize(("found", "said"), [(None, "cache      32 tokens predicted"), (32, "cache      32 tokens predicted, 32 found"),
                                             (16, "cache      32 tokens predicted, 16 found (-16)")])
def test_a_record_says_what_was_predicted_of_the_cache_and_what_was_found(found, said):
    columns = {facts.OVERLAP_TOKENS: (0, 32)}
    stack = Stack(scorers=(Part("scorer", "s", ByOverlap()),))
    case = Case(RoutingRequest("r", "m", prompt_tokens=40), (Worker(1), Worker(2)), columns, ())
    decision = attrs.evolve(record(stack, case, 1), cached_tokens=found)
    assert said in decision.render().splitlines()
    again = Decision.from_json(decision.to_json())
    assert (again.overlap_tokens, again.cached_tokens) == (32, found)
    assert "cache " not in attrs.evolve(decision, columns={}, cached_tokens=None).render()


def test_a_record_tells_the_age_of_what_any_provider_heard_and_what_is_wrong_with_it():
    columns = {Fact("acme.index_age", float, "s"): (0.25, math.inf), Fact("acme.index_problem", str): ("", "it has been silent for 5 s")}
    decision = record(Stack(), Case(RoutingRequest("r", "m", prompt_tokens=40), (Worker(1), Worker(2)), columns, ()), 1)
    for lines in (decision.render().splitlines(), Decision.from_json(decision.to_json()).render().splitlines()):
        assert "age        acme.index_age: 0.2 to 0.2 s, 1 of 2 workers said nothing" in lines
        assert f"degraded   {decision.labels[1]}: it has been silent for 5 s" in lines


class ByOverlap:
    needs = (facts.OVERLAP_TOKENS,)
    scale = "raw"

    def score(self, request, fleet):
        return fleet[facts.OVERLAP_TOKENS]


@pytest.mark.parametrize("change", [
    {"worker": [9, 0]}, {"candidates": [99, 0, 1]}, {"labels": []}, {"workers": []}, {"seed": "x"}, {"rejected": [[7, "load", "why"]]}, {"totals": [1.0]},
    {"columns": {"bookings.requests": {"unit": "", "values": [1]}}},
])
def test_a_record_that_was_edited_until_its_parts_do_not_fit_is_refused_and_not_believed(change):
    raw = json.loads(decided().to_json())
    assert Decision.from_json(json.dumps(raw)).worker
    with pytest.raises(ValueError, match="this is no decision record"):
        Decision.from_json(json.dumps(raw | change))
