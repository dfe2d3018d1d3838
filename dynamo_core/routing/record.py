"""The record of one decision: cheap to keep, rendered only when somebody asks, and enough to decide again.

The score matrix is the explanation. `recompute` gives the same worker from the record alone, today or from a file of
JSON lines tomorrow, because policies are pure over what is recorded here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs
import msgspec

from dynamo_core.routing import facts as known
from dynamo_core.routing.contract import Dice, Fact, RoutingRequest, Worker
from dynamo_core.routing.decide import Choice, Fault, Rejection, Stack
from dynamo_core.types import Hints

_KNOWN_FACTS = {fact.name: fact for fact in known.ALL}


@attrs.define(eq=False)
class Decision:
    """Why a request went where it went. Columns are shared with other records: never write to them."""

    id: str
    request: RoutingRequest
    """Without the prompt and the cache salt."""
    worker: Worker | None
    """The chosen one; `None` when no worker could take the request."""
    workers: Sequence[Worker]
    labels: Sequence[str]
    """A name for people, for each worker."""
    columns: Mapping[Fact[Any], Sequence[Any]]
    rejected: Sequence[Rejection]
    candidates: Sequence[int]
    scores: Mapping[str, tuple[float, Sequence[float]]]
    totals: Sequence[float]
    faults: Sequence[Fault]
    seed: int
    """Of the dice."""
    stack: str
    """`Stack.hash`."""
    generation: int
    """Counts the stacks that this router has had, from 1."""
    time: float
    """Unix time."""
    dry_run: bool = False
    dispatched: Worker | None = None
    """The worker that actually served, set by the pipeline."""
    outcome: str = ""
    """`done`, `failed` or `cancelled`, once it is known."""
    waited: float = 0.0
    """Seconds in the router's queue before it."""
    cached_tokens: int | None = None
    """Prompt tokens that the engine had in its cache, by its own word at the first token; compare `overlap_tokens`."""

    # -------------------------------------------------------------- what people ask

    @property
    def reason(self) -> str:
        """Why no worker was chosen; empty when one was."""
        if self.worker is not None:
            return ""
        return "; ".join(self.reasons()) or "no worker is registered"

    def reasons(self) -> list[str]:
        """Each rejection in a sentence."""
        return [f"{self.labels[row]}: {why} ({by})" for row, by, why in self.rejected]

    @property
    def margin(self) -> float | None:
        """Total of the chosen worker minus the best other total; below zero when chance chose a lesser one, `None` without a runner-up."""
        if self.worker is None or len(self.totals) < 2:
            return None
        row = self._row()
        return self.totals[row] - max(total for i, total in enumerate(self.totals) if i != row)

    @property
    def ties(self) -> int:
        """How many workers shared the highest total; 1 when there was no tie."""
        return list(self.totals).count(max(self.totals)) if self.totals else 0

    @property
    def overlap_tokens(self) -> int:
        """Leading prompt tokens that the chosen worker was believed to hold; 0 when no KV index took part."""
        column = self.columns.get(known.OVERLAP_TOKENS)
        return 0 if column is None or self.worker is None else int(column[self.candidates[self._row()]])

    def _row(self) -> int:
        return next(i for i, row in enumerate(self.candidates) if self.workers[row] == self.worker)

    def recompute(self, stack: Stack) -> Choice:
        """Decide again from the record alone. With the stack of the same hash it is the same worker.

        Policies that broke their contract at the time are left out again, as they may do better today.
        """
        skip = {policy for policy, _ in self.faults} if stack.hash == self.stack else ()
        return stack.decide(self.request, self.workers, self.columns, Dice(self.seed), skip)

    # -------------------------------------------------------------- for people

    def render(self, labels: Mapping[Worker, str] | None = None) -> str:
        """The decision as text: every candidate by total, every rejection with reason and author."""
        names = [(labels or {}).get(worker, self.labels[i]) for i, worker in enumerate(self.workers)]
        request = self.request
        chosen = "nobody" if self.worker is None else names[self.candidates[self._row()]]
        about = [
            f"decision   {self.id}" + ("  (dry run)" if self.dry_run else ""),
            f"request    {request.id}  model {request.model}  {request.role}  {request.prompt_tokens} prompt tokens"
            + (f"  tenant {request.tenant}" if request.tenant else ""),
            f"chosen     {chosen}{self._how_clear()}",
            f"stack      {self.stack}  generation {self.generation}  dice {self.seed:#x}",
            f"time       {datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S.%f} UTC",
        ]
        if self.dispatched is not None or self.outcome:
            served = "nobody" if self.dispatched is None else dict(zip(self.workers, names, strict=True)).get(self.dispatched, str(self.dispatched))
            about.append(f"served by  {served}" + (f", {self.outcome}" if self.outcome else ""))
        if (found := self._how_true()) != "":
            about.append(f"cache      {found}")
        if self.waited:
            about.append(f"waited     {self.waited:.3f} s in the router's queue")
        if (wanted := _hints(request)) != "":
            about.append(f"hints      {wanted}")
        about += self._ages()
        about += [f"degraded   {who}: {what}" for who, what in self._problems(names)]
        about += [f"skipped    {policy}: {what}" for policy, what in self.faults]
        return "\n".join([*about, "", *self._table(names)]).rstrip()

    def _ages(self) -> list[str]:
        """Of everything that was known by hearsay."""
        lines: list[str] = []
        for fact, column in self.columns.items():
            if fact.name.endswith(known.AGE_SUFFIX):
                ages = [float(age) for age in column if math.isfinite(age)]
                silent = len(column) - len(ages)
                parts = [f"{min(ages):.1f} to {max(ages):.1f} s"] if ages else []
                parts += [f"{silent} of {len(column)} workers said nothing"] if silent else []
                lines.append(f"age        {fact.name}: {', '.join(parts)}")
        return lines

    def _problems(self, names: Sequence[str]) -> list[tuple[str, str]]:
        columns = [column for fact, column in self.columns.items() if fact.name.endswith(known.PROBLEM_SUFFIX)]
        return [(name, str(what)) for column in columns for name, what in zip(names, column, strict=True) if what]

    def _how_true(self) -> str:
        """What was believed of the worker's cache, beside what its engine said."""
        if known.OVERLAP_TOKENS not in self.columns or self.worker is None:
            return ""
        predicted, found = self.overlap_tokens, self.cached_tokens
        if found is None:
            return f"{predicted} tokens predicted"
        return f"{predicted} tokens predicted, {found} found" + ("" if predicted == found else f" ({found - predicted:+d})")

    def _how_clear(self) -> str:
        if self.worker is None:
            return f", because {self.reason}" if not self.rejected else ", every worker was rejected"
        margin, ties = self.margin, self.ties
        if margin is None:
            return ", the only candidate"
        return f"  margin {margin:+.4g}" + (f"  one of {ties} equals, by the dice" if ties > 1 else "")

    def _table(self, names: Sequence[str]) -> list[str]:
        rows: list[list[str]] = []
        if self.totals:
            rows.append(["", "worker", "total", *(f"{weight:g} x {name}" for name, (weight, _) in self.scores.items())])
        chosen = self._row() if self.worker is not None else -1
        for i in sorted(range(len(self.totals)), key=lambda i: (-self.totals[i], names[self.candidates[i]])):
            values = (f"{scores[i]:.4g}" for _, scores in self.scores.values())
            rows.append(["*" if i == chosen else "", names[self.candidates[i]], f"{self.totals[i]:.4g}", *values])
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))] if rows else [0, 0]
        name_width = max([widths[1], *(len(names[row]) for row, _, _ in self.rejected)])
        lines: list[str] = []
        for mark, name, *cells in rows:
            lines.append(f"{mark:<1} {name:<{name_width}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[2:], strict=True)))
        return lines + [f"x {names[row]:<{name_width}}  {by}: {why}" for row, by, why in self.rejected]

    # -------------------------------------------------------------- for programs

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        request = self.request
        return {
            "id": self.id,
            "request": {
                "id": request.id,
                "model": request.model,
                "role": request.role,
                "prompt_tokens": request.prompt_tokens,
                "hints": msgspec.to_builtins(request.hints),
                "adapter": request.adapter,
                "max_tokens": request.max_tokens,
                "failed": [list(worker) for worker in request.failed],
                "tenant": request.tenant,
            },
            "worker": self.worker and list(self.worker),
            "reason": self.reason,
            "margin": self.margin,
            "ties": self.ties,
            "workers": [list(worker) for worker in self.workers],
            "labels": list(self.labels),
            "columns": {fact.name: {"unit": fact.unit, **_column(column)} for fact, column in self.columns.items()},
            "rejected": [list(rejection) for rejection in self.rejected],
            "candidates": list(self.candidates),
            "scores": {name: {"weight": weight, "values": list(values)} for name, (weight, values) in self.scores.items()},
            "totals": list(self.totals),
            "faults": [list(fault) for fault in self.faults],
            "seed": self.seed,
            "stack": self.stack,
            "generation": self.generation,
            "time": self.time,
            "dry_run": self.dry_run,
            "dispatched": self.dispatched and list(self.dispatched),
            "outcome": self.outcome,
            "waited": self.waited,
            "overlap_tokens": self.overlap_tokens,
            "cached_tokens": self.cached_tokens,
        }

    def summary(self) -> dict[str, Any]:
        """The decision without its reasons, fit for JSON: what a list shows."""
        names = dict(zip(self.workers, self.labels, strict=True))
        return {
            "id": self.id,
            "request": self.request.id,
            "model": self.request.model,
            "tenant": self.request.tenant,
            "time": self.time,
            "worker": self.worker and names.get(self.worker),
            "served": self.dispatched and names.get(self.dispatched),
            "outcome": self.outcome,
            "dry_run": self.dry_run,
            "candidates": len(self.candidates),
            "rejected": len(self.rejected),
        }

    def to_json(self) -> str:
        """One line; `from_json` gives back the same decision, to the bit."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Decision:
        """:raises ValueError: this is no decision record."""
        try:
            raw: dict[str, Any] = json.loads(line)
            request = raw["request"]
            decision = cls(
                id=raw["id"],
                request=RoutingRequest(
                    request["id"], request["model"], (), request["prompt_tokens"], request["role"], msgspec.convert(request["hints"], Hints),
                    request["adapter"], None, request["max_tokens"], tuple(Worker(*worker) for worker in request["failed"]), (),
                    request.get("tenant"),
                ),
                worker=_worker(raw["worker"]),
                workers=tuple(Worker(*worker) for worker in raw["workers"]),
                labels=tuple(raw["labels"]),
                columns={_KNOWN_FACTS.get(name) or Fact(name, object, column["unit"]): _uncolumn(column) for name, column in raw["columns"].items()},
                rejected=[(row, by, why) for row, by, why in raw["rejected"]],
                candidates=raw["candidates"],
                scores={name: (score["weight"], score["values"]) for name, score in raw["scores"].items()},
                totals=raw["totals"],
                faults=[(policy, what) for policy, what in raw["faults"]],
                seed=raw["seed"],
                stack=raw["stack"],
                generation=raw["generation"],
                time=raw["time"],
                dry_run=raw["dry_run"],
                dispatched=_worker(raw["dispatched"]),
                outcome=raw["outcome"],
                waited=raw.get("waited", 0.0),
                cached_tokens=raw.get("cached_tokens"),
            )
            decision._must_fit()
        except (KeyError, TypeError, AttributeError, msgspec.ValidationError, json.JSONDecodeError) as e:
            raise ValueError(f"this is no decision record: {type(e).__name__}: {e}") from e
        return decision

    def _must_fit(self) -> None:
        """A file may have been cut, joined or edited. :raises ValueError: its parts do not belong together."""
        rows = range(len(self.workers))
        for what, column in (("labels", self.labels), *((fact.name, column) for fact, column in self.columns.items())):
            if len(column) != len(rows):
                raise ValueError(f"this is no decision record: {len(column)} values of {what!r} for {len(rows)} workers")
        for row in (*self.candidates, *(row for row, _, _ in self.rejected)):
            if row not in rows:
                raise ValueError(f"this is no decision record: there is no worker {row}")
        if len(self.totals) not in (0, len(self.candidates)) or type(self.seed) is not int:
            raise ValueError("this is no decision record: totals and candidates, or the seed, are not what a router writes")
        if self.worker is not None and self.worker not in (self.workers[row] for row in self.candidates):
            raise ValueError(f"this is no decision record: the worker that was chosen, {self.worker}, is no candidate")


def _worker(raw: Sequence[int] | None) -> Worker | None:
    return None if raw is None else Worker(*raw)


def _hints(request: RoutingRequest) -> str:
    said: Mapping[str, Any] = msgspec.to_builtins(request.hints)
    shown = [f"{name} {value}" for name, value in said.items()]
    if request.failed:
        shown.append("failed on " + ", ".join(map(str, request.failed)))
    return "  ".join(shown)


# JSON knows neither infinity, nor tuples, nor numpy: such values are tagged, so that a policy sees the same column again.
# numpy itself is imported only where a provider used it.


def _column(column: Any) -> dict[str, Any]:
    if hasattr(column, "dtype"):
        return {"dtype": column.dtype.str, "values": [_tagged(x) for x in column.tolist()]}
    return {"values": [_tagged(x) for x in column]}


def _uncolumn(raw: Mapping[str, Any]) -> Sequence[Any]:
    values = [_untagged(x) for x in raw["values"]]
    if "dtype" not in raw:
        return tuple(values)
    import numpy as np

    array: Any = np.array(values, dtype=raw["dtype"])
    array.setflags(write=False)
    return array


def _tagged(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple | list):
        return {"tuple": [_tagged(x) for x in value]}
    if isinstance(value, frozenset | set):
        return {"set": [_tagged(x) for x in sorted(value)]}
    if hasattr(value, "dtype"):
        return _tagged(value.item())
    return {"text": str(value)}


def _untagged(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items()))
    if kind == "float":
        return float(inner)
    if kind == "tuple":
        return tuple(_untagged(x) for x in inner)
    return frozenset(_untagged(x) for x in inner) if kind == "set" else inner
