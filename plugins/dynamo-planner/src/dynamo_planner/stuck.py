"""Notices that what is wanted does not happen, and says so in a sentence."""

from __future__ import annotations

import attrs

from dynamo_planner.record import Decision


@attrs.define
class _Streak:
    what: str = ""
    times: int = 0
    since: float = 0.0

    def seen(self, what: str, at: float) -> int:
        """How often in a row. An empty `what` ends the streak."""
        if what != self.what:
            self.what, self.times, self.since = what, 0, at
        self.times += bool(what)
        return self.times


@attrs.define
class StuckDetector:
    """Looks at each decision. :param after: decisions in a row that are alike before something is said."""

    after: int
    _held: dict[str, _Streak] = attrs.field(init=False, factory=dict[str, _Streak])
    _slow: dict[str, _Streak] = attrs.field(init=False, factory=dict[str, _Streak])
    _act: _Streak = attrs.field(init=False, factory=_Streak)

    def look(self, decision: Decision) -> list[str]:
        """What is stuck now, for people."""
        found: list[str] = []
        for role, wanted in decision.wanted.items():
            seen = decision.fleet.get(role)
            desired = seen.desired if seen is not None else 0
            won = decision.won(role)
            direction = "up" if wanted > desired else "down" if wanted < desired else ""
            stopped = direction and decision.targets.get(role) == desired and won is not None
            streak = self._held.setdefault(role, _Streak())
            vetoed = f"scale {role} {direction}, vetoed by {won.by}" if stopped and won is not None else ""
            if streak.seen(vetoed, decision.at) >= self.after and won is not None:
                found.append(f"wanted {streak.times} times to {streak.what}: {won.why}")
            streak = self._slow.setdefault(role, _Streak())
            short = f"{seen.desired} {role} replicas are desired" if seen is not None and seen.ready < seen.desired else ""
            late = decision.at - streak.since if streak.seen(short, decision.at) >= self.after else 0.0
            if seen is not None and late > max(3 * decision.cold_start, 30.0):
                found.append(f"{short} and {seen.ready} are ready, for {late:.0f} s" + (f"; {seen.reducible} will never start" if seen.reducible else ""))
        trouble = decision.action if decision.action in ("refused", "unavailable", "skipped", "failed") else ""
        if self._act.seen(trouble, decision.at) >= self.after:
            found.append(f"{self._act.times} decisions in a row were {trouble}: {decision.result or '; '.join(decision.missing)}")
        return found
