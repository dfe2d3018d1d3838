"""Constrain: what stands between a wish and the fleet. The planner applies these after all others, in the order of `LAST_WORD`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import attrs

from dynamo_planner.contract import Constrained, ConstrainStage, Targets, View


def _each(view: View, targets: Targets, rule: Callable[[str, int], tuple[int, str]]) -> Constrained:
    ruled = {role: rule(role, target) for role, target in targets.items()}
    return Constrained({role: target for role, (target, _) in ruled.items()}, {role: why for role, (target, why) in ruled.items() if target != targets[role]})


@attrs.frozen
class Patience:
    """Fewer only after fewer have been enough for a while: the most that was wanted in that time."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "patience"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        since = view.at - view.limits.patience
        recent = [wanted for at, wanted in view.wanted if at >= since]
        long_enough = bool(view.wanted) and view.wanted[0][0] <= since

        def rule(role: str, target: int) -> tuple[int, str]:
            now = view.replicas(role)
            if target >= now or view.limits.patience <= 0:
                return target, ""
            if not long_enough:
                return now, f"fewer must have been enough for {view.limits.patience:g} s first"
            most = min(now, max([target, *(wanted.get(role, now) for wanted in recent)]))
            return most, f"{most} were wanted within the last {view.limits.patience:g} s"

        return _each(view, targets, rule)


@attrs.frozen
class Reachable:
    """Replicas that will never start are taken back, and for a while no more are asked for: there is no room, or something is wrong with them."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "reachable"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        def rule(role: str, target: int) -> tuple[int, str]:
            state = view.observation.fleet.get(role)
            if state is None:
                return target, ""
            if state.reducible:
                reachable = max(state.ready, state.desired - state.reducible)
                return min(target, reachable), f"{state.reducible} of {state.desired} will never start"
            past = view.unstarted.get(role)
            if past is None or (left := past.at + view.limits.retry - view.at) <= 0:
                return target, ""
            # What somebody else has added meanwhile stays: it may well have found room.
            return min(target, max(past.beside, state.desired)), f"{past.count} never started {view.at - past.at:.0f} s ago; tried again in {left:.0f} s"

        return _each(view, targets, rule)


@attrs.frozen
class Step:
    """Not more than a few replicas at once, in either direction."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "max_step"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        step = view.limits.max_step

        def rule(role: str, target: int) -> tuple[int, str]:
            now = view.replicas(role)
            return min(max(target, now - step), now + step), f"at most {step} at once, from {now}"

        return _each(view, targets, rule)


@attrs.frozen
class Bounds:
    """Minimum and maximum of each role."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "bounds"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        def rule(role: str, target: int) -> tuple[int, str]:
            least, most = view.limits.least(role), view.limits.most(role)
            if target < least:
                return least, f"the minimum is {least}"
            return (most, f"the maximum is {most}") if most is not None and target > most else (target, "")

        return _each(view, targets, rule)


@attrs.frozen
class Budget:
    """The GPUs that all roles share. Each role keeps its minimum; the rest goes, one replica at a time, to the role that is shortest of what it wants."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "budget"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        budget = view.limits.gpus
        cost = {role: max(0, view.gpus(role)) for role in targets}
        asked = sum(count * cost[role] for role, count in targets.items())
        if budget is None or asked <= budget:
            return Constrained(targets)
        given = share(targets, {role: min(targets[role], view.limits.least(role)) for role in targets}, cost, budget)
        why = {role: f"{asked} GPUs are asked for and {budget} may be used" for role in targets if given[role] != targets[role]}
        return Constrained(given, why)


def share(wanted: Targets, least: Mapping[str, int], cost: Mapping[str, int], budget: int) -> dict[str, int]:
    """Replicas by role within the budget. Minimums beyond the budget are cut as well, from the greatest on: a budget is a budget."""
    given = dict(least)
    while (used := sum(count * cost[role] for role, count in given.items())) > budget:
        given[max((role for role in given if given[role] and cost[role]), key=lambda role: given[role] * cost[role])] -= 1
    while fitting := [role for role in wanted if given[role] < wanted[role] and used + cost[role] <= budget]:
        poorest = max(fitting, key=lambda role: wanted[role] / (given[role] + 0.5))
        given[poorest] += 1
        used += cost[poorest]
    return given


@attrs.frozen
class Idle:
    """Nothing runs while nobody asks. Only where `limits.idle` says so; the first request that is held wakes the fleet."""

    stage: ClassVar[Literal["constrain"]] = "constrain"
    name: ClassVar[str] = "idle"

    def constrain(self, view: View, targets: Targets) -> Constrained:
        idle, load = view.limits.idle, view.observation.load
        if idle is None or load is None or load.rate > 0 or load.in_progress > 0 or load.held > 0:
            return Constrained(targets)
        quiet = 0.0
        for past in reversed(view.history):
            if past.rate > 0 or past.in_progress > 0 or past.held > 0:
                break
            quiet += past.seconds
        if quiet < idle:
            return Constrained(targets)
        return Constrained(dict.fromkeys(targets, 0), {role: f"nobody has asked for {quiet:g} s" for role, target in targets.items() if target})


LAST_WORD: tuple[ConstrainStage, ...] = (Patience(), Step(), Reachable(), Bounds(), Budget(), Idle())
"""Budget after minimum and step: these three may contradict each other, and money wins."""
