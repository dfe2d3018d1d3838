"""What the routing kits draw from: requests, and fleets whose columns respect the type and unit of each fact."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dynamo_core.routing import facts as known
from dynamo_core.routing.contract import Dice, Fact, Fleet, RoutingRequest, Worker
from dynamo_core.types import Hints

MOST_WORKERS = 12
TAINTS = ("gpu=h200", "gpu=b300", "zone=a", "zone=b", "spot")

kit_settings = settings(
    deadline=None,  # a busy machine is no fault of the plugin
    max_examples=30,
    derandomize=True,  # the same plugin gets the same verdict every time
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors],
)

_SPECIAL: Mapping[Fact[Any], st.SearchStrategy[Any]] = {
    known.INHIBITED: st.one_of(st.just(0.0), st.floats(0, 60)),
    known.TAINTS: st.lists(st.sampled_from(TAINTS), max_size=3, unique=True).map(tuple),
    known.TURN: st.integers(-1, 10**6),
    known.BLOCK_SIZE: st.sampled_from([1, 16, 64]),
    known.ENGINE_REPORT_AGE: st.one_of(st.just(math.inf), st.floats(0, 60)),
}


def values_of(fact: Fact[Any]) -> st.SearchStrategy[Any]:
    """Plausible values: by the fact itself if the core knows it, otherwise by type and unit."""
    if fact in _SPECIAL:
        return _SPECIAL[fact]
    by_type: dict[Any, st.SearchStrategy[Any]] = {
        int: st.one_of(st.integers(0, 3), st.integers(0, 10**6)),
        float: st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1 if fact.unit == "1" else 1e6)),
        bool: st.booleans(),
        str: st.sampled_from(["", "a", "disconnected"]),
        tuple: st.lists(st.sampled_from(TAINTS), max_size=3, unique=True).map(tuple),
        frozenset: st.frozensets(st.sampled_from(TAINTS), max_size=3),
    }
    return by_type.get(fact.type, st.none())


class Watched(Fleet):
    """A fleet that notices which facts were read, however they were reached and whatever became of the exception."""

    __slots__ = ("read",)

    def __init__(self, workers: Sequence[Worker], columns: Mapping[Fact[Any], Sequence[Any]], needs: Collection[Fact[Any]]) -> None:
        self.read: set[str] = set()
        super().__init__(workers, _Noticing(columns, self.read), "the policy under test", frozenset(needs))

    def __getitem__(self, fact: Fact[Any]) -> Sequence[Any]:
        self.read.add(fact.name)
        return super().__getitem__(fact)


class _Noticing(dict[Fact[Any], Sequence[Any]]):
    def __init__(self, columns: Mapping[Fact[Any], Sequence[Any]], read: set[str]) -> None:
        super().__init__(columns)
        self._read = read

    def __getitem__(self, fact: Fact[Any]) -> Sequence[Any]:
        self._read.add(fact.name)
        return super().__getitem__(fact)


class Case:
    """One request and one fleet, from which each test makes the `Fleet` that it wants."""

    def __init__(self, request: RoutingRequest, workers: Sequence[Worker], columns: Mapping[Fact[Any], Sequence[Any]], needs: Collection[Fact[Any]]) -> None:
        self.request = request
        self.workers = tuple(workers)
        self.columns = {fact: tuple(column) for fact, column in columns.items()}
        self.needs = needs

    def __repr__(self) -> str:
        facts = {fact.name: column for fact, column in self.columns.items() if fact in self.needs}
        return f"{len(self.workers)} workers {facts}, {self.request}"

    def fleet(self, convert: Callable[[Fact[Any], Sequence[Any]], Any] | None = None) -> Fleet:
        """Confined to the declared facts, as the stack hands it out."""
        columns = {fact: self.columns[fact] if convert is None else convert(fact, self.columns[fact]) for fact in self.needs}
        return Fleet(self.workers, columns, "the policy under test", frozenset(self.needs))

    def watched(self) -> Watched:
        """With columns for facts that the policy did not declare, too."""
        everything = {fact: (0,) * len(self.workers) for fact in known.ALL} | self.columns
        return Watched(self.workers, everything, self.needs)

    def permuted(self, order: Sequence[int]) -> Case:
        return Case(self.request, [self.workers[i] for i in order], {f: [c[i] for i in order] for f, c in self.columns.items()}, self.needs)

    def writable(self) -> tuple[RoutingRequest, Fleet, Callable[[], str | None]]:
        """A request and a fleet that can be written to, and a function that says what was."""
        request = copy.deepcopy(self.request)
        workers = list(self.workers)
        columns = {fact: list(self.columns[fact]) for fact in self.needs}
        given: dict[Fact[Any], Sequence[Any]] = dict(columns)
        fleet = Fleet(workers, given, "the policy under test", frozenset(self.needs))

        def written() -> str | None:
            if request != self.request:
                return "the request"
            if tuple(workers) != self.workers:
                return "the list of workers"
            changed = [fact.name for fact, column in columns.items() if tuple(column) != self.columns[fact]]
            if changed:
                return f"the column {changed[0]!r}"
            if any(given.get(fact) is not column for fact, column in columns.items()) or len(given) != len(columns):
                return "the table of columns"
            return None

        return request, fleet, written


def as_array(fact: Fact[Any], column: Sequence[Any]) -> Any:
    """A read-only array of a numeric column; other columns stay tuples."""
    if fact.type not in (int, float, bool):
        return tuple(column)
    array = np.array(column, dtype=fact.type)
    array.setflags(write=False)
    return array


@st.composite
def requests(draw: st.DrawFn) -> RoutingRequest:
    some = draw(st.booleans())
    hints = Hints() if not some else Hints(
        instance=draw(st.one_of(st.none(), st.integers(1, MOST_WORKERS))),
        dp_rank=draw(st.one_of(st.none(), st.integers(0, 1))),
        session=draw(st.one_of(st.none(), st.just("s1"))),
        priority=draw(st.integers(-1, 5)),
        required_taints=tuple(draw(st.lists(st.sampled_from(TAINTS), max_size=2, unique=True))),
        preferred_taints=draw(st.dictionaries(st.sampled_from(TAINTS), st.floats(-2, 2), max_size=3)),
    )
    failed = tuple(Worker(i) for i in draw(st.lists(st.integers(1, MOST_WORKERS), max_size=2, unique=True)))
    return RoutingRequest("request", "model", (), draw(st.integers(1, 10**5)), draw(st.sampled_from(["aggregated", "prefill", "decode"])), hints, failed=failed)


@st.composite
def cases(draw: st.DrawFn, needs: Collection[Fact[Any]], column: Callable[[Fact[Any]], st.SearchStrategy[Any]] = values_of) -> Case:
    rows = draw(st.integers(1, MOST_WORKERS))
    workers = [Worker(1 + i // 2, i % 2) for i in range(rows)] if draw(st.booleans()) else [Worker(1 + i) for i in range(rows)]
    columns: dict[Fact[Any], list[Any]] = {}
    for fact in needs:
        # A few values dealt out over the rows: as many ties as in life, and far fewer draws than one for each row.
        few = draw(st.lists(column(fact), min_size=1, max_size=min(rows, 5)))
        deal = Dice(draw(st.integers(0, 2**32)))
        columns[fact] = [few[deal.below(len(few))] for _ in range(rows)]
    return Case(draw(requests()), workers, columns, needs)


def cpu_us(call: Callable[[], Any], times: int = 50) -> float:
    """CPU time of one call, in microseconds: the least of several, as the machine may be busy."""
    best = math.inf
    for _ in range(times):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best * 1e6


def typical(needs: Collection[Fact[Any]], rows: int = 64) -> Case:
    """The fleet by which costs are compared: 64 workers, all of them different where the type allows."""
    samples: dict[Any, Callable[[int], Any]] = {int: lambda i: i, float: lambda i: i / rows, bool: lambda i: i % 2 == 0, str: lambda i: "", tuple: lambda i: ()}
    columns = {fact: [samples.get(fact.type, lambda i: None)(i) for i in range(rows)] for fact in needs}
    return Case(RoutingRequest("request", "model", (), 1000), [Worker(i + 1) for i in range(rows)], columns, needs)
