"""The planner: observe, decide, act, record; once a tick. It knows no clock of its own, so that a day of traffic can pass in a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import attrs
import msgspec

from dynamo_core.errors import ConnectorUnavailable, DynamoError, ScaleRefused
from dynamo_core.scaling import Connector, RoleState
from dynamo_planner.contract import Load, Observation, Targets, WorkerReport
from dynamo_planner.mind import Mind
from dynamo_planner.record import Decision, Journal, LoadSeen, Ring
from dynamo_planner.stuck import StuckDetector

log = logging.getLogger("dynamo.planner")


class Missing(DynamoError):
    """A part of what must be seen cannot be seen; the text says which and why."""

    code = "planner_missing"


class LoadSource(Protocol):
    """Where the load is read."""

    async def load(self, at: float) -> Load | None:
        """Of the time since the last call; None at the first. :raises Missing: it cannot be known."""
        ...


class ReportSource(Protocol):
    """Where the workers' own reports are read."""

    def reports(self, at: float) -> Sequence[WorkerReport]: ...

    def problems(self) -> Sequence[str]:
        """Why reports may not arrive; empty when all is well."""
        ...


@attrs.define(eq=False)
class Planning:
    """One planner. `tick(at)` makes one decision and carries it out."""

    mind: Mind
    connector: Connector
    source: LoadSource
    workers: ReportSource | None = None
    """None: no stage looks at reports."""
    number: int = 0
    """Of the last decision; a planner that goes on with a journal goes on with its numbers."""
    on_decision: Callable[[Decision], None] = lambda decision: None
    ring: Ring = attrs.field(init=False)
    _journal: Journal | None = attrs.field(init=False)
    _stuck: StuckDetector = attrs.field(init=False)
    _fleet: Mapping[str, RoleState] = attrs.field(init=False, factory=dict[str, RoleState])
    _asked: dict[str, tuple[float, int]] = attrs.field(init=False, factory=dict[str, tuple[float, int]])
    """By role, when more were asked for, and how many: a cold start is measured from it."""

    def __attrs_post_init__(self) -> None:
        table = self.mind.table
        self.ring = Ring(table.decisions)
        self._journal = Journal(table.record, table.record_bytes) if table.record is not None else None
        self._stuck = StuckDetector(table.stuck_after)

    async def tick(self, at: float) -> Decision:
        """Observe, decide, act. Never raises for what the world does: that becomes part of the decision."""
        began = time.perf_counter()
        observation = await self._observe(at)
        point = self.mind.history.add(observation.load) if observation.load is not None else None
        if point is not None:
            self.mind.learn(point, self._fleet)
        decision = await self._act(self.mind.decide(observation), at)
        self.number += 1
        decision = msgspec.structs.replace(decision, number=self.number, interval=LoadSeen.of(point), cold_start=self.mind.cold_start,
                                           seconds=time.perf_counter() - began)
        decision = msgspec.structs.replace(decision, stuck=self._stuck.look(decision))
        self.ring.add(decision)
        if self._journal is not None:
            self._journal.add(decision)
        self.on_decision(decision)
        return decision

    # -------------------------------------------------------------- observe

    async def _observe(self, at: float) -> Observation:
        missing: list[str] = []
        try:
            self._fleet = await self.connector.observe()
            missing += [f"the fleet: the connector knows no {role} workers" for role in self.mind.table.roles if role not in self._fleet]
            self._time_starts(at)
        except ConnectorUnavailable as e:
            missing.append(f"the fleet: {e}")
        try:
            load = await self.source.load(at)
            if load is None:
                missing.append("the load: this was the first look, and two make a rate")
        except Missing as e:
            load = None
            missing.append(str(e))
        reports: Sequence[WorkerReport] = ()
        if self.workers is not None:
            reports = self.workers.reports(at)
            missing += self._unreported(reports)
        return Observation(at, load, self._fleet, reports, tuple(missing))

    def _unreported(self, reports: Sequence[WorkerReport]) -> list[str]:
        assert self.workers is not None
        problems = list(self.workers.problems())
        why = f" ({'; '.join(problems)})" if problems else ""
        found: list[str] = []
        for role in self.mind.table.roles:
            if (state := self._fleet.get(role)) is None:
                continue
            told = sum(report.role == role for report in reports)
            if told < state.ready:
                found.append(f"load reports: {told} of {state.ready} ready {role} workers have reported{why}")
        return found

    def _time_starts(self, at: float) -> None:
        for role, state in self._fleet.items():
            if role in self._asked and state.ready >= self._asked[role][1]:
                took = at - self._asked.pop(role)[0]
                self.mind.cold_start = max(took, 0.5 * (self.mind.cold_start + took))  # a slow start is believed at once, a fast one by half
            elif role in self._asked and state.desired < self._asked[role][1]:
                del self._asked[role]

    # -------------------------------------------------------------- act

    async def _act(self, decision: Decision, at: float) -> Decision:
        changes = {role: count for role, count in decision.targets.items() if count != decision.fleet[role].desired}
        if decision.action != "kept" or not changes:
            return decision
        said = ", ".join(f"{role} {decision.fleet[role].desired} -> {count}" for role, count in changes.items())
        if self.mind.table.dry_run:
            return msgspec.structs.replace(decision, action="dry-run", result=said)
        try:
            await self.connector.scale(changes, reason=reason(decision, changes))
        except ScaleRefused as e:
            return msgspec.structs.replace(decision, action="refused", result=f"{said}: {e}")
        except ConnectorUnavailable as e:
            return msgspec.structs.replace(decision, action="unavailable", result=f"{said}: {e}")
        for role, count in changes.items():
            if count > decision.fleet[role].desired:
                self._asked[role] = (at, count)
            else:
                self._asked.pop(role, None)
        log.info("scaled %s", said)
        return msgspec.structs.replace(decision, action="scaled", result=said)


def reason(decision: Decision, changes: Targets) -> str:
    """One line for the platform: for each role the constraint that won, or the proposal that asked for most."""
    parts: list[str] = []
    for role in changes:
        won = decision.won(role)
        asked = max((p for p in decision.proposals if role in p.targets), key=lambda p: p.targets[role], default=None)
        why = f"{won.by}: {won.why}" if won is not None else f"{asked.by}: {asked.why.get(role, '')}" if asked is not None else "as configured"
        parts.append(f"{role} {decision.fleet[role].desired} -> {changes[role]} ({why})")
    return "; ".join(parts)
