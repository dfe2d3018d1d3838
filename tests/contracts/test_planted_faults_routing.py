"""The routing kits, cheated in every way that came to mind: each fault must be found by the guarantee that forbids it."""

import inspect
import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dynamo_core.contracts import FilterContract, PickerContract, ScorerContract
from dynamo_core.contracts.fleets import kit_settings
from dynamo_core.errors import UndeclaredFact
from dynamo_core.routing.facts import IN_FLIGHT, TAINTS, TURN

# Shrinking a counterexample to a planted fault helps nobody.
QUICK = settings(kit_settings, phases=[Phase.generate])


def finds(kit: type, role: str, fault: type, guarantee: str) -> bool:
    """Whether a test of this guarantee fails for the broken implementation; each gets a fresh one."""
    for name, test in inspect.getmembers(kit, inspect.isfunction):
        if not name.startswith(f"test_{guarantee.lower()}_"):
            continue
        if hasattr(test, "hypothesis"):
            test = QUICK(given(data=st.data())(test.hypothesis.inner_test))
        try:
            test(kit(), **{role: fault()})
        except Exception:
            return True
    return False


# ------------------------------------------------------------------ scorers


class Scores:
    needs = (IN_FLIGHT,)


class OutOfRange(Scores):
    def score(self, request, fleet):
        return [float(x) for x in fleet[IN_FLIGHT]]


class OneShort(Scores):
    def score(self, request, fleet):
        return [0.5] * (len(fleet) - 1)


class ByPosition(Scores):
    def score(self, request, fleet):
        return [i / len(fleet) for i in range(len(fleet))]


class NotANumber(Scores):
    def score(self, request, fleet):
        return [float("nan")] * len(fleet)


class InfiniteRaw(Scores):
    scale = "raw"

    def score(self, request, fleet):
        return [float("inf") if x > 1000 else -float(x) for x in fleet[IN_FLIGHT]]


class DividesByZero(Scores):
    def score(self, request, fleet):
        most, least = max(fleet[IN_FLIGHT]), min(fleet[IN_FLIGHT])
        return [(most - x) / (most - least) for x in fleet[IN_FLIGHT]]


class ReadsUndeclared(Scores):
    def score(self, request, fleet):
        return [1.0 if turn < 0 else 0.0 for turn in fleet[TURN]]


class ReadsUndeclaredAndHidesIt(Scores):
    def score(self, request, fleet):
        try:
            fleet[TURN]
        except UndeclaredFact:
            pass
        return [1.0] * len(fleet)


class ReadsBehindTheFleet(Scores):
    def score(self, request, fleet):
        return [1.0 if turn < 0 else 0.0 for turn in fleet._columns[TURN]]


class SortsInPlace(Scores):
    def score(self, request, fleet):
        fleet[IN_FLIGHT].sort()
        return [1.0] * len(fleet)


class EmptiesTheHints(Scores):
    def score(self, request, fleet):
        request.hints.preferred_taints.clear()
        return [1.0] * len(fleet)


class ReplacesAColumn(Scores):
    def score(self, request, fleet):
        fleet._columns[IN_FLIGHT] = (0,) * len(fleet)
        return [1.0] * len(fleet)


class ThrowsDice(Scores):
    def score(self, request, fleet):
        return [random.random() for _ in fleet.workers]


class Remembers(Scores):
    def __init__(self):
        self.most = 1

    def score(self, request, fleet):
        self.most = max(self.most, *fleet[IN_FLIGHT])
        return [x / self.most for x in fleet[IN_FLIGHT]]


class WrongScale(Scores):
    scale = "percent"

    def score(self, request, fleet):
        return [1.0] * len(fleet)


class NamesAsNeeds:
    needs = ("bookings.in_flight",)

    def score(self, request, fleet):
        return [1.0] * len(fleet)


class OnlyTuples(Scores):
    def score(self, request, fleet):
        return [1.0 if fleet[IN_FLIGHT] else 0.0] * len(fleet)


@pytest.mark.parametrize(
    ("fault", "guarantee"),
    [
        (OutOfRange, "R2"),
        (OneShort, "R2"),
        (NotANumber, "R2"),
        (InfiniteRaw, "R2"),
        (DividesByZero, "R2"),
        (WrongScale, "R2"),
        (ByPosition, "R3"),
        (NamesAsNeeds, "R1"),
        (ReadsUndeclared, "R1"),
        (ReadsUndeclaredAndHidesIt, "R1"),
        (ReadsBehindTheFleet, "R1"),
        (SortsInPlace, "R4"),
        (EmptiesTheHints, "R4"),
        (ReplacesAColumn, "R4"),
        (OnlyTuples, "R4"),
        (ThrowsDice, "R6"),
        (Remembers, "R6"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_scorer_kit_finds(fault, guarantee):
    assert finds(ScorerContract, "scorer", fault, guarantee)


# ------------------------------------------------------------------ filters


class Rejects:
    needs = (IN_FLIGHT,)


class NoReason(Rejects):
    def reject(self, request, fleet):
        return {i: "" for i, x in enumerate(fleet[IN_FLIGHT]) if x > 2}


class ListsRows(Rejects):
    def reject(self, request, fleet):
        return [i for i, x in enumerate(fleet[IN_FLIGHT]) if x > 2]


class ReturnsNothing(Rejects):
    def reject(self, request, fleet):
        return None


class NamesWorkers(Rejects):
    def reject(self, request, fleet):
        return {fleet.workers[i]: "it is full" for i, x in enumerate(fleet[IN_FLIGHT]) if x > 2}


class CountsFromOne(Rejects):
    def reject(self, request, fleet):
        return {i: "it is full" for i, x in enumerate(fleet[IN_FLIGHT], 1) if x > 2}


class DropsTheFirst(Rejects):
    def reject(self, request, fleet):
        return {0: "it was first"} if len(fleet) > 1 else {}


class RejectsByChance(Rejects):
    def reject(self, request, fleet):
        return {i: "bad luck" for i in range(len(fleet)) if random.random() < 0.5}


class RejectsEverySecondCall(Rejects):
    def __init__(self):
        self.calls = 0

    def reject(self, request, fleet):
        self.calls += 1
        return dict.fromkeys(range(len(fleet)), "not this time") if self.calls % 4 == 0 else {}


class RejectsByUndeclared(Rejects):
    def reject(self, request, fleet):
        return {i: "it is tainted" for i, taints in enumerate(fleet[TAINTS]) if taints}


class RemovesWorkers(Rejects):
    def reject(self, request, fleet):
        fleet.workers.pop()
        return {}


@pytest.mark.parametrize(
    ("fault", "guarantee"),
    [
        (NoReason, "R5"),
        (ListsRows, "R5"),
        (ReturnsNothing, "R5"),
        (NamesWorkers, "R5"),
        (CountsFromOne, "R5"),
        (DropsTheFirst, "R3"),
        (RejectsByChance, "R6"),
        (RejectsEverySecondCall, "R6"),
        (RejectsByUndeclared, "R1"),
        (RemovesWorkers, "R4"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_filter_kit_finds(fault, guarantee):
    assert finds(FilterContract, "filter", fault, guarantee)


# ------------------------------------------------------------------ pickers


class AlwaysFirst:
    def pick(self, totals, fleet, dice):
        return 0


class FirstOfEquals:
    def pick(self, totals, fleet, dice):
        return list(totals).index(max(totals))


class Worst:
    def pick(self, totals, fleet, dice):
        rows = [i for i, t in enumerate(totals) if t == min(totals)]
        return rows[dice.below(len(rows))]


class OwnDice:
    def pick(self, totals, fleet, dice):
        return random.randrange(len(totals))


class InTurn:
    def __init__(self):
        self.turn = -1

    def pick(self, totals, fleet, dice):
        self.turn += 1
        return self.turn % len(totals)


class OffByOne:
    def pick(self, totals, fleet, dice):
        return dice.below(len(totals) + 1)


class ReturnsTheWorker:
    def pick(self, totals, fleet, dice):
        return fleet.workers[dice.below(len(totals))]


class SortsTotals:
    def pick(self, totals, fleet, dice):
        top = max(totals)
        totals.sort()
        rows = [i for i, t in enumerate(totals) if t == top]
        return rows[dice.below(len(rows))]


class PicksByUndeclared:
    def pick(self, totals, fleet, dice):
        return min(range(len(totals)), key=lambda i: fleet[IN_FLIGHT][i])


@pytest.mark.parametrize(
    ("fault", "guarantee"),
    [
        (AlwaysFirst, "R3"),
        (FirstOfEquals, "R3"),
        (Worst, "R2"),
        (OffByOne, "R2"),
        (ReturnsTheWorker, "R2"),
        (OwnDice, "R6"),
        (InTurn, "R6"),
        (SortsTotals, "R4"),
        (PicksByUndeclared, "R1"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_picker_kit_finds(fault, guarantee):
    assert finds(PickerContract, "picker", fault, guarantee)
