"""The record of one choice of a pool, kept to be asked for: every pool with what was known of it, and why it was taken or left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import attrs

from dynamo_global_router.contract import PoolFacts, PoolRequest


@attrs.define
class PoolRow:
    """One pool in one decision."""

    name: str
    state: str
    """`ready`, `degraded`, `full`, `gone`, or `unfit` for this request."""
    why: str = ""
    """Why it is in this state; empty when it is ready."""
    facts: PoolFacts | None = None
    """`None` when there was nothing to know."""
    note: str = ""
    """What the strategy says of it."""
    tried: str = ""
    """What became of the request there: `serves`, or an error."""
    decisions: Sequence[str] = ()
    """Ids of the decisions of the pool's own router."""


@attrs.define(eq=False)
class PoolDecision:
    id: str
    request: PoolRequest
    model: str
    targets_from: tuple[str, str]
    """Who said the TTFT and the ITL target: `request`, `default` or `nobody`."""
    strategy: str
    time: float
    """Unix time."""
    rows: list[PoolRow]
    tried: list[str] = attrs.field(factory=list[str])
    """Pools that the request was sent to, in order."""
    kind: str = "nobody"
    why: str = ""
    served: str | None = None
    """The pool that took the request."""
    ttft_ms: float | None = None
    """What the time to the first token was."""
    itl_ms: float | None = None
    """What the time between tokens was, on average."""

    @property
    def chosen(self) -> str | None:
        return self.tried[0] if self.tried else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        plain = attrs.asdict(self)
        for row in plain["rows"]:
            if row["facts"] is not None and row["facts"]["estimate"]["age_s"] == float("inf"):
                row["facts"]["estimate"]["age_s"] = None
        return {"kind_of_record": "pool", **plain, "chosen": self.chosen, "text": self.render()}

    # -------------------------------------------------------------- for people

    def render(self) -> str:
        request = self.request
        priority = f"  priority {request.priority}" if request.priority else ""
        about = [
            f"pools      {self.id}",
            f"request    {request.id}  model {self.model}  {request.role}  {request.input_tokens} prompt tokens{priority}",
            f"targets    TTFT {_ms(request.ttft_target_ms)} ({self.targets_from[0]})  ITL {_ms(request.itl_target_ms)} ({self.targets_from[1]})",
            f"chosen     {self.chosen or 'nobody'}: {self.why}",
            f"strategy   {self.strategy} ({self.kind})",
            f"time       {datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S.%f} UTC",
        ]
        if self.served is not None:
            about.append(f"served by  {self.served}" + (f", TTFT {_ms(self.ttft_ms)}" if self.ttft_ms is not None else "")
                         + (f", ITL {_ms(self.itl_ms)}" if self.itl_ms is not None else ""))
        return "\n".join([*about, "", *self._table()]).rstrip()

    def _table(self) -> list[str]:
        rows = [["", "pool", "cost", "rank", "TTFT ms", "ITL ms", "learned", "uncached", "backlog", "running", "workers", "remarks"]]
        left: list[str] = []
        chosen = self.chosen
        for row in self.rows:
            if row.facts is None:
                left.append(f"x {row.name}: {row.state}: {row.why}")
                continue
            facts, estimate = row.facts, row.facts.estimate
            remarks = "; ".join(filter(None, (f"{row.state}: {row.why}" if row.why else "", row.note, row.tried)))
            rows.append(["*" if row.name == chosen else "", row.name, f"{facts.cost:g}", str(facts.rank), _off(estimate.ttft_ms, estimate.ttft_error),
                         _off(estimate.itl_ms, estimate.itl_error), str(estimate.samples), str(facts.uncached_tokens), str(facts.backlog_tokens),
                         f"{facts.sequences}" + (f"/{facts.max_sequences}" if facts.max_sequences else ""), str(facts.workers), remarks])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"{row[0]:<1} {row[1]:<{widths[1]}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[2:-1], widths[2:-1], strict=True))
                 + f"  {row[-1]}" for row in rows] if len(rows) > 1 else []
        return [line.rstrip() for line in lines] + left


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms"


def _off(value: float, error: float) -> str:
    return f"{value:.1f}" + (f" ±{100 * error:.0f}%" if error else "")


class Decisions:
    """The latest ones, by request id, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._order: deque[PoolDecision] = deque()
        self._by_request: dict[str, PoolDecision] = {}

    def push(self, decision: PoolDecision) -> None:
        if not self._limit:
            return
        self._order.append(decision)
        self._by_request[decision.request.id] = decision
        if len(self._order) > self._limit:
            oldest = self._order.popleft()
            if self._by_request.get(oldest.request.id) is oldest:
                del self._by_request[oldest.request.id]

    def of(self, request_id: str) -> PoolDecision | None:
        return self._by_request.get(request_id)

    def __len__(self) -> int:
        return len(self._order)
