"""How much cached prompt the router passed by, and why: the best overlap in the fleet minus that of the chosen worker."""

from __future__ import annotations

from typing import Any, Literal

from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.record import Decision

Cause = Literal["none", "filter", "affinity", "tie", "load", "chance", "stale"]
CAUSES: tuple[Cause, ...] = ("filter", "affinity", "tie", "load", "chance", "stale")

AFFINITY = "session"
"""Filters whose name begins so hold a request to a worker on purpose."""


def regret_of(decision: Decision) -> tuple[int, Cause]:
    """Tokens, and the cause.

    `filter`: every best holder was rejected. `affinity`: in favour of the session's worker. Of those that were not, the one with the highest total counts.
    `tie`: it had the same total. `load`: its total was worse. `chance`: its total was better, and the picker drew another. `stale` is found out later, by
    `stale_tokens`.
    """
    overlaps: Any = decision.columns.get(OVERLAP_TOKENS)
    if overlaps is None or decision.worker is None:
        return 0, "none"
    most = int(overlaps.max()) if hasattr(overlaps, "max") else max(overlaps)
    missed = most - decision.overlap_tokens
    if missed <= 0:
        return 0, "none"
    holders = {row for row, overlap in enumerate(overlaps) if overlap == most}
    could = [total for row, total in zip(decision.candidates, decision.totals, strict=True) if row in holders]
    if not could:
        by = next((by for row, by, _ in decision.rejected if row in holders), "")
        return missed, "affinity" if by.startswith(AFFINITY) else "filter"
    best = max(could)
    chosen = next(total for row, total in zip(decision.candidates, decision.totals, strict=True) if decision.workers[row] == decision.worker)
    return missed, "tie" if best == chosen else "load" if best < chosen else "chance"


def stale_tokens(decision: Decision, cached_tokens: int | None) -> int:
    """Prompt tokens that the chosen worker was believed to hold and did not, once its engine has said how many it had."""
    if cached_tokens is None or OVERLAP_TOKENS not in decision.columns:
        return 0
    return max(0, decision.overlap_tokens - cached_tokens)
