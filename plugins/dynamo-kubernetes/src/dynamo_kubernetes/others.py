"""Others write the same numbers: a person, an autoscaler, a rollout. Their word is noticed, told, and for a while not contradicted."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import attrs

from dynamo_core.errors import ScaleRefused
from dynamo_kubernetes.workloads import Workload

log = logging.getLogger("dynamo.kubernetes")


@attrs.frozen
class _Change:
    by: str
    was: int
    until: float


@attrs.define
class Others:
    patience: float
    """Seconds for which a role is left to whoever changed it."""
    _known: dict[str, int] = attrs.field(init=False, factory=dict[str, int])
    """What each role should have, as we saw or wrote it last."""
    _tried: dict[str, int] = attrs.field(init=False, factory=dict[str, int])
    """What we sent last; whether it arrived is not always known."""
    _changed: dict[str, _Change] = attrs.field(init=False, factory=dict[str, _Change])

    def trying(self, role: str, count: int) -> None:
        self._tried[role] = count

    def ours(self, role: str, count: int) -> None:
        self._known[role] = count
        self._tried.pop(role, None)

    def notice(self, workloads: Mapping[str, Workload]) -> None:
        """Compare what is read with what we knew."""
        for role, workload in workloads.items():
            was = self._known.get(role)
            self._known[role] = workload.desired
            if was is not None and workload.desired not in (was, self._tried.get(role)):
                by = workload.writer or "somebody else"
                self._changed[role] = _Change(by, was, time.monotonic() + self.patience)
                log.warning("%s (%s) was changed from %d to %d by %s; it is left alone for %g s", role, workload.name, was, workload.desired, by, self.patience)

    def refuse(self, wanted: Mapping[str, Workload]) -> None:
        """:raises ScaleRefused: one of these was changed by somebody else a moment ago."""
        now = time.monotonic()
        for role, workload in wanted.items():
            change = self._changed.get(role)
            if change is not None and now < change.until:
                left = change.until - now
                raise ScaleRefused(f"{change.by} changed {role} from {change.was} to {workload.desired}; it is left alone for another {left:.0f} s")
