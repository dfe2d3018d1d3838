"""A routing stack: filters, then weighted scorers, then a picker. Deciding is pure; whatever has state is a fact provider.

A policy that breaks its contract is left out of the decision at hand and named in the result; it never fails a request.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import attrs

from dynamo_core.config.schema import Queue
from dynamo_core.routing.contract import Dice, Fact, Filter, Fleet, Picker, Policy, RoutingRequest, Scorer, Worker
from dynamo_core.routing.pickers import best

Rejection = tuple[int, str, str]
"""Row, filter, reason."""
Fault = tuple[str, str]
"""Policy, and what it did."""
Scores = dict[str, tuple[float, Sequence[float]]]


@attrs.frozen(eq=False)
class Part:
    """One component of a stack, bound to its name there."""

    kind: str
    name: str
    """Unique in its stack: a second `load` is `load#2`."""
    component: Any
    use: str = ""
    """The name under which it is registered."""
    weight: float = 1.0
    plugin: str = ""
    needs: frozenset[Fact[Any]] = attrs.field(init=False, default=attrs.Factory(lambda self: frozenset(getattr(self.component, "needs", ())), takes_self=True))
    raw: bool = attrs.field(init=False, default=attrs.Factory(lambda self: getattr(self.component, "scale", "unit") == "raw", takes_self=True))
    busy: bool = attrs.field(init=False, default=attrs.Factory(lambda self: bool(getattr(self.component, "busy", False)), takes_self=True))

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"use": self.use or self.name, "plugin": self.plugin, "options": options_of(self.component)}
        if self.kind == "scorer":
            about |= {"weight": self.weight, "scale": "raw" if self.raw else "unit"}
        return about


def options_of(component: Any) -> dict[str, Any]:
    """Every option with its value, defaults included; secrets are masked."""
    if not attrs.has(type(component)):
        return {}
    fields = [a for a in attrs.fields(type(component)) if a.init]
    return {a.alias: "***" if "Secret" in str(a.type) else _plain(getattr(component, a.name)) for a in fields}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(attrs.asdict(value) if attrs.has(type(value)) else value, default=str))


@attrs.define
class Choice:
    """What a stack decided, and everything that explains it. Rows are rows of the whole fleet."""

    worker: Worker | None
    rejected: list[Rejection]
    candidates: Sequence[int]
    """The rows that no filter rejected; scores and totals have one entry for each."""
    scores: Scores
    """By scorer: its weight and its scores."""
    totals: Sequence[float]
    faults: list[Fault]


@attrs.define(eq=False)
class Stack:
    """A resolved stack. `policy`, when set, takes the place of scorers and picker."""

    filters: tuple[Part, ...] = ()
    scorers: tuple[Part, ...] = ()
    picker: Part | None = None
    policy: Part | None = None
    providers: tuple[Part, ...] = ()
    """Of facts. Where two provide the same fact, the first counts."""
    queue: Queue | None = None
    """How requests wait while no worker has room; decisions do not depend on it."""
    shadow: Stack | None = None
    """Decides along, and is only compared."""
    needs: frozenset[Fact[Any]] = attrs.field(init=False)
    hash: str = attrs.field(init=False)
    """Digest of `describe()`: two stacks with the same hash decide alike."""

    def __attrs_post_init__(self) -> None:
        self.needs = frozenset().union(*(part.needs for part in self.policies))
        self.hash = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def policies(self) -> tuple[Part, ...]:
        return (*self.filters, *self.scorers, *(part for part in (self.policy, self.picker) if part is not None))

    def describe(self) -> dict[str, Any]:
        """The stack with every option, as plain data."""
        return {
            "filters": [part.describe() for part in self.filters],
            "scorers": [part.describe() for part in self.scorers],
            "picker": self.picker.describe() if self.picker else None,
            "policy": self.policy.describe() if self.policy else None,
            "facts": [part.describe() for part in self.providers],
        }

    def decide(
        self, request: RoutingRequest, workers: Sequence[Worker], columns: Mapping[Fact[Any], Sequence[Any]], dice: Dice, skip: Collection[str] = (),
        spent: dict[str, float] | None = None,
    ) -> Choice:
        """Choose a worker. Pure: the same arguments give the same choice.

        :param workers: and :param columns: tuples or read-only arrays, as policies see them.
        :param skip: policies to leave out, as if they had broken their contract. :param spent: receives the seconds that each policy took.
        """
        faults: list[Fault] = []
        if skip or not self.needs <= columns.keys():
            skip = self._unusable(columns, skip, faults)
        fleet, candidates, rejected = self._filter(request, Fleet(workers, columns), skip, faults, spent)
        if not candidates:
            return Choice(None, rejected, candidates, {}, (), faults)
        scores: Scores = {}
        if self.policy is not None:
            row, totals = _timed(spent, self.policy.name, self._choose, self.policy, request, fleet, dice, skip, faults)
            scores[self.policy.name] = (1.0, totals)
        else:
            totals = self._score(request, fleet, skip, scores, faults, spent)
            row = self._pick(totals, fleet, dice, skip, faults)
        return Choice(workers[candidates[row]], rejected, candidates, scores, totals, faults)

    def _unusable(self, columns: Mapping[Fact[Any], Sequence[Any]], skip: Collection[str], faults: list[Fault]) -> Collection[str]:
        unusable = set(skip)
        for part in self.policies:
            if missing := sorted(fact.name for fact in part.needs if fact not in columns):
                unusable.add(part.name)
                if part.name not in skip:
                    faults.append((part.name, f"nobody provided {', '.join(missing)} for this decision"))
        return unusable

    def _filter(
        self, request: RoutingRequest, fleet: Fleet, skip: Collection[str], faults: list[Fault], spent: dict[str, float] | None
    ) -> tuple[Fleet, Sequence[int], list[Rejection]]:
        candidates: Sequence[int] = range(len(fleet))
        rejected: list[Rejection] = []
        for part in self.filters:
            if part.name in skip:
                continue
            try:
                answer: Mapping[int, str] = _timed(spent, part.name, part.component.reject, request, fleet.seen_by(part.name, part.needs))
                no = _checked_rows(answer, len(fleet)) if answer or type(answer) is not dict else None
            except BaseException as e:
                faults.append((part.name, blamed(e)))
                continue
            if no:
                rejected += [(candidates[i], part.name, no[i]) for i in sorted(no)]
                kept = [i for i in range(len(fleet)) if i not in no]
                candidates = [candidates[i] for i in kept]
                if not candidates:
                    break
                fleet = fleet.take(kept)
        return fleet, candidates, rejected

    def _score(
        self, request: RoutingRequest, fleet: Fleet, skip: Collection[str], scores: Scores, faults: list[Fault], spent: dict[str, float] | None
    ) -> list[float]:
        totals: list[float] = []
        for part in self.scorers:
            if part.name in skip:
                continue
            try:
                values = _checked_scores(_timed(spent, part.name, part.component.score, request, fleet.seen_by(part.name, part.needs)), len(fleet))
                if not part.raw and (min(values) < 0.0 or max(values) > 1.0):
                    values = [min(1.0, max(0.0, x)) for x in values]
                weight = part.weight
                added = [t + weight * x for t, x in zip(totals, values, strict=True)] if totals else [weight * x for x in values]
                if part.raw:
                    _must_be_finite(added)
            except BaseException as e:
                faults.append((part.name, blamed(e)))
                continue
            totals = added
            scores[part.name] = (weight, values)
        return totals or [0.0] * len(fleet)

    def _pick(self, totals: list[float], fleet: Fleet, dice: Dice, skip: Collection[str], faults: list[Fault]) -> int:
        if (part := self.picker) is None or part.name in skip:
            return best(totals, dice)
        seed = dice.seed
        try:
            return _checked_row(part.component.pick(tuple(totals), fleet.seen_by(part.name, part.needs), dice), len(totals))
        except BaseException as e:
            faults.append((part.name, blamed(e)))
            return best(totals, Dice(seed))

    def _choose(self, part: Part, request: RoutingRequest, fleet: Fleet, dice: Dice, skip: Collection[str], faults: list[Fault]) -> tuple[int, list[float]]:
        seed = dice.seed
        if part.name not in skip:
            try:
                row, values = part.component.choose(request, fleet.seen_by(part.name, part.needs), dice)
                return _checked_row(row, len(fleet)), _checked_scores(values, len(fleet))
            except BaseException as e:
                faults.append((part.name, blamed(e)))
        return Dice(seed).below(len(fleet)), [0.0] * len(fleet)


def _timed(spent: dict[str, float] | None, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    if spent is None:
        return call(*arguments)
    started = time.perf_counter()
    try:
        return call(*arguments)
    finally:
        spent[name] = time.perf_counter() - started


def protocol_of(kind: str) -> type:
    """What a component of this kind must implement."""
    return {"filter": Filter, "scorer": Scorer, "picker": Picker, "policy": Policy}[kind]


def blamed(error: BaseException) -> str:
    """The fault of a component that raised this: also when it is no `Exception`, as of `sys.exit` or a panic in Rust. Ctrl-C is nobody's fault, and goes on."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    return said(error)


def said(error: BaseException) -> str:
    """An exception in one line, for records and logs."""
    try:
        text = " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:
        text = f"{type(error).__name__}, which cannot say what it is about"
    return text if len(text) <= 300 else text[:297] + "..."


def _checked_rows(answer: Any, rows: int) -> dict[int, str]:
    if not isinstance(answer, Mapping):
        raise TypeError(f"`reject` must return {{row: reason}}, not {type(answer).__name__}")
    no = {operator.index(row): str(reason) for row, reason in answer.items()}
    if no and not (min(no) >= 0 and max(no) < rows):
        raise ValueError(f"it rejected row {max(no) if max(no) >= rows else min(no)} of a fleet of {rows}")
    return no


def _checked_scores(answer: Any, rows: int) -> list[float]:
    values = list(map(float, answer.tolist() if hasattr(answer, "tolist") else answer))
    if len(values) != rows:
        raise ValueError(f"{len(values)} scores for {rows} workers")
    _must_be_finite(values)
    return values


def _must_be_finite(values: list[float]) -> None:
    # The sum of finite numbers is finite but for overflow, so that one C call settles nearly every case.
    if not math.isfinite(sum(values)) and (bad := next((i for i, x in enumerate(values) if not math.isfinite(x)), None)) is not None:
        raise ValueError(f"the score of row {bad} is {values[bad]}")


def _checked_row(answer: Any, rows: int) -> int:
    row = operator.index(answer)
    if not 0 <= row < rows:
        raise ValueError(f"it chose row {row} of {rows}")
    return row
