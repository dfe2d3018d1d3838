"""Reconcile: several proposals become one target for each role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs

from dynamo_planner.contract import Proposal, Targets, View


@attrs.frozen
class Merge:
    """The greatest of what was set, at least every floor, at most the lowest ceiling; a floor above a ceiling wins. Without an opinion, as it is."""

    stage: ClassVar[Literal["reconcile"]] = "reconcile"

    def reconcile(self, view: View, proposals: Sequence[Proposal]) -> Targets:
        return {role: self._role(view.replicas(role), [(p.kind, p.targets[role]) for p in proposals if role in p.targets]) for role in view.roles}

    def _role(self, now: int, said: Sequence[tuple[str, int]]) -> int:
        floors = [count for kind, count in said if kind == "at_least"]
        ceilings = [count for kind, count in said if kind == "at_most"]
        settled = [count for kind, count in said if kind == "set"]
        target = max(settled) if settled else max(floors) if floors else now
        if ceilings:
            target = min(target, *ceilings)
        return max([target, *floors])
