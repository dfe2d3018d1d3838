"""Propose: what the engines say of themselves now. Up at once, in proportion; down by one, if the others could carry what it carries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import attrs
from attrs import validators as v

from dynamo_planner.contract import Outlook, Proposal, View, WorkerReport
from dynamo_planner.history import RECENT, merged
from dynamo_planner.stages import capacity

FULL = 0.9
"""Pressure on the room for sequences from which on requests wait for room."""


@attrs.frozen
class ByLoad:
    """Keeps the pressure on the workers between two marks. Pressure 1 is the most that meets the targets."""

    stage: ClassVar[Literal["propose"]] = "propose"
    up: float = attrs.field(default=1.0, validator=v.gt(0))
    """More replicas above this pressure."""
    aim: float = attrs.field(default=0.8, validator=v.gt(0))
    """So many that the pressure falls to this."""
    down: float = attrs.field(default=0.65, validator=v.gt(0))
    """One replica fewer, if the pressure on the others stays below this."""

    def __attrs_post_init__(self) -> None:
        if not self.down < self.aim <= self.up:
            raise ValueError(f"down < aim <= up must hold: {self.down}, {self.aim}, {self.up}")

    def propose(self, view: View, outlook: Outlook | None) -> Proposal | None:
        targets: dict[str, int] = {}
        why: dict[str, str] = {}
        for role in view.roles:
            targets[role], why[role] = self._role(view, role, [report for report in view.observation.reports if report.role == role])
        return Proposal("load", "set", targets, why)

    def _role(self, view: View, role: str, reports: Sequence[WorkerReport]) -> tuple[int, str]:
        desired = view.replicas(role)
        load = view.observation.load
        state = view.observation.fleet.get(role)
        if not reports and state is not None and state.ready:
            return desired, "the workers' reports are not known"
        if not reports:
            wanted = load is not None and (load.held > 0 or load.rate > 0)
            return (max(1, desired), "requests arrive and nobody serves") if wanted else (desired, "nobody serves and nobody asks")
        pressure, what = pressure_of(view, role, reports)
        ready = len(reports)
        if pressure > self.up:
            needed = max(ready + 1, math.ceil(ready * pressure / self.aim))
            return max(needed, desired), f"pressure {pressure:.2f} on {ready} ready ({what}) is above {self.up:g}"
        if state is not None and (state.starting > state.reducible or state.draining):
            return desired, f"pressure {pressure:.2f} ({what}); replicas are still coming or going"
        if ready > 1 and desired == ready:
            consolidated, what = pressure_of(view, role, reports, replicas=ready - 1)
            if consolidated < self.down:
                return desired - 1, f"{ready - 1} would have a pressure of {consolidated:.2f} ({what}), below {self.down:g}"
        return desired, f"pressure {pressure:.2f} ({what})"


def pressure_of(view: View, role: str, reports: Sequence[WorkerReport], replicas: int | None = None) -> tuple[float, str]:
    """The greatest of what can be seen, and its name. :param replicas: as if the same load were on so many."""
    n = replicas or len(reports)
    parts: dict[str, float] = {}
    demand = _demand(view)
    if role != "prefill":
        parts["KV cache"] = sum(report.kv_share for report in reports) / n / 0.9
        running, waiting = sum(report.running for report in reports), sum(report.waiting for report in reports)
        if all(report.slots for report in reports):
            parts["sequences at once"] = (running + waiting) / n / (sum(report.slots for report in reports) / len(reports)) / 0.9
        # Where the price of a prompt is known, those that only wait to be read count by it; so many at once, as after a pause, are soon read.
        if waiting > len(reports) and (view.performance is None or max(parts.values()) > FULL):
            parts["waiting requests"] = (running + waiting) / max(1, running) * len(reports) / n
        if view.performance is not None and demand is not None:
            busy = min(0.9, demand.rate * capacity.reading(demand, view.performance).mean / n) if role == "aggregated" else 0.0
            most = capacity.most_concurrency(view.performance, demand.context, view.itl * (1 - busy))
            parts["sequences for the ITL target"] = running / n / capacity.occupancy(most, view.share)
    if role != "decode":
        parts |= _prefill(view, reports, n)
    if replicas is None:
        parts |= _seen(view, role)
    name = max(parts, key=lambda part: parts[part])
    return parts[name], name


def _seen(view: View, role: str) -> dict[str, float]:
    """What clients felt. It says that there are too few, and hardly how many: a queue grows for as long as it is there."""
    load = view.observation.load
    found: dict[str, float] = {}
    if role != "decode" and load is not None and load.ttft is not None:
        found["TTFT that was seen"] = min(1.5, load.ttft / view.ttft)
    if role != "prefill" and load is not None and load.itl is not None:
        found["ITL that was seen"] = min(1.5, load.itl / view.itl)
    return found


def _demand(view: View) -> capacity.Demand | None:
    """Of the last interval; None when nothing ended in it."""
    load = view.history[-1] if view.history else view.observation.load
    if load is None or not load.prompt_tokens:
        return None
    spread = merged(view.history[-RECENT:]).prompt_spread if view.history else load.prompt_spread
    return capacity.Demand(load.rate, load.prompt_tokens, load.output_tokens, load.cached_share, spread)


def _prefill(view: View, reports: Sequence[WorkerReport], n: int) -> dict[str, float]:
    tokens = sum(report.waiting_prefill_tokens for report in reports) / n
    if (demand := _demand(view)) is None:
        return {"queued prompts": 0.0}
    if view.performance is None:
        return {"queued prompts": tokens / demand.prompt_tokens}
    work = capacity.reading(demand, view.performance)
    queued = tokens / max(1.0, demand.uncached) * work.mean
    found = {"queued prompts for the TTFT target": queued / max(view.ttft - work.mean, 0.1 * view.ttft)}
    late = capacity.late(n, demand.rate, work, view.ttft)
    # 1 exactly when as many are late as may be; the busy share alone says nothing about a queue of few servers.
    found["late first tokens"] = (late / (1 - view.share)) ** 0.25 if view.share < 1 else float(late > 0)
    return found
