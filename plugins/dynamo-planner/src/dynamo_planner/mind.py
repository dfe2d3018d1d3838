"""What the planner knows and how it decides, without eyes and hands: the same for a live fleet, a simulated one, and for `what-if`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import attrs
import msgspec

from dynamo_core.errors import PluginError
from dynamo_core.scaling import RoleState
from dynamo_planner.config import Planner
from dynamo_planner.contract import Load, Observation, Performance, Predictor, Targets, Unstarted, View
from dynamo_planner.decide import Stages
from dynamo_planner.history import History
from dynamo_planner.performance.live import Live
from dynamo_planner.record import Decision, LoadSeen, RoleSeen

RECENT = 10
"""Intervals for which a planner may have been away and still go on with its history."""

log = logging.getLogger("dynamo.planner")


@attrs.define(eq=False)
class Mind:
    """History, performance and stages."""

    table: Planner
    stages: Stages
    predictor: Predictor
    profile: Performance | None = None
    """Measured beforehand; None: learned from the intervals."""
    history: History = attrs.field(init=False)
    cold_start: float = attrs.field(init=False)
    _live: Live = attrs.field(init=False)
    _wanted: deque[tuple[float, Targets]] = attrs.field(init=False, factory=deque[tuple[float, Targets]])
    _unstarted: dict[str, Unstarted] = attrs.field(init=False, factory=dict[str, Unstarted])

    def __attrs_post_init__(self) -> None:
        self.history = History(self.table.interval, self.table.history)
        self.cold_start = self.table.cold_start
        self._live = Live(self.table.learn.samples, self.table.learn.window)

    def learn(self, point: Load, fleet: Mapping[str, RoleState]) -> None:
        """Take an interval as an example of what the engines can do."""
        self._live.learn(point, *(next((fleet[role].ready for role in (own, "aggregated") if role in fleet), 0) for own in ("decode", "prefill")))

    def notice(self, at: float, fleet: Mapping[str, RoleState]) -> None:
        """Remember what never started."""
        for role, state in fleet.items():
            if state.reducible:
                self._unstarted[role] = Unstarted(at, state.reducible, max(state.ready, state.desired - state.reducible))

    def recall(self, past: Sequence[Decision], until: float) -> int:
        """Learn from recorded decisions, and go on with their history if it ends shortly before `until`; a gap would shift every season.

        Returns how many points of history there are now.
        """
        for decision in past:
            self.notice(decision.at, {role: seen.state() for role, seen in decision.fleet.items()})
        points = [(d.interval.load(), d.fleet) for d in past if d.interval is not None]
        for point, fleet in points:
            self.learn(point, {role: seen.state() for role, seen in fleet.items()})
        if points and 0 <= until - points[-1][0].at <= RECENT * self.table.interval:
            for point, _ in points:
                self.history.restore(point)
        return len(self.history.points)

    def view(self, observation: Observation) -> View:
        table = self.table
        performance = self.profile if self.profile is not None else self._live.performance()
        return View(observation.at, observation, self.history.points, table.roles, performance, self.predictor, table.ttft, table.itl, table.share,
                    table.limits(), table.interval, self.cold_start, tuple(self._wanted), dict(self._unstarted))

    def decide(self, observation: Observation) -> Decision:
        """The decision for what was seen. With anything missing there is none, and the fleet stays as it is."""
        seen = Decision(at=observation.at, load=LoadSeen.of(observation.load), missing=observation.missing,
                        fleet={role: RoleSeen.of(state) for role, state in observation.fleet.items()})
        if observation.missing:
            return msgspec.structs.replace(seen, action="skipped", result="; ".join(observation.missing))
        self.notice(observation.at, observation.fleet)
        try:
            decision = self.stages.decide(self.view(observation))
        except PluginError as e:
            log.error("no decision: %s", e)
            return msgspec.structs.replace(seen, action="failed", result=str(e))
        self._wanted.append((observation.at, decision.wanted))
        while len(self._wanted) > 1 and self._wanted[1][0] <= observation.at - self.table.patience:
            self._wanted.popleft()
        if decision.silent and self.profile is None and (learning := self._live.problem()) is not None:
            decision = msgspec.structs.replace(decision, silent=learning)
        return decision
