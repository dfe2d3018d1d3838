"""The built-in filters: each names the workers that must not serve a request, and why."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import DRAINING, ENGINE_KV_USAGE, ENGINE_REPORT_AGE, IN_FLIGHT, INHIBITED, INHIBITED_WHY, MAX_SEQUENCES, PROVEN, TAINTS

NOBODY: Mapping[int, str] = {}


@attrs.frozen
class Ready:
    """Drops workers that are inhibited, draining or not yet proven."""

    needs = (INHIBITED, INHIBITED_WHY, DRAINING, PROVEN)

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        inhibited, draining, proven = fleet[INHIBITED], fleet[DRAINING], fleet[PROVEN]
        if not any(inhibited) and not any(draining) and all(proven):
            return NOBODY
        no: dict[int, str] = {}
        for i, why in enumerate(fleet[INHIBITED_WHY]):
            if draining[i]:
                no[i] = "it is draining"
            elif not proven[i]:
                no[i] = "no canary request has come back from it yet"
            elif inhibited[i] > 0:
                no[i] = f"inhibited for {inhibited[i]:.1f} s more" + (f": {why}" if why else "")
        return no


@attrs.frozen
class NotFailed:
    """Drops workers that have already failed this request."""

    needs = ()

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        if not request.failed:
            return NOBODY
        return {i: "it failed this request before" for i, worker in enumerate(fleet.workers) if worker in request.failed}


@attrs.frozen
class Pinned:
    """Keeps only the instance, and the data-parallel rank, that the caller asked for."""

    required: bool = False
    """Refuse requests that name no instance."""
    needs = ()

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        hints = request.hints
        if request.role == "encode":
            return NOBODY  # Pins name who reads the prompt and who generates.
        instance = hints.prefill_instance if request.role == "prefill" else hints.instance
        rank = hints.dp_rank
        if instance is None and self.required:
            return dict.fromkeys(range(len(fleet)), "the request names no instance, and this router only does as it is told")
        if instance is None and rank is None:
            return NOBODY
        return {
            i: "the caller asked for another instance" if instance not in (None, worker.instance) else f"the caller asked for data-parallel rank {rank}"
            for i, worker in enumerate(fleet.workers)
            if instance not in (None, worker.instance) or rank not in (None, worker.dp_rank)
        }


@attrs.frozen
class Taints:
    """Keeps workers that have every taint that the caller requires."""

    needs = (TAINTS,)

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        if not (required := request.hints.required_taints):
            return NOBODY
        lacking = (next((t for t in required if t not in taints), None) for taints in fleet[TAINTS])
        return {i: f"it lacks the required taint {taint!r}" for i, taint in enumerate(lacking) if taint is not None}


@attrs.frozen
class NotFull:
    """Drops workers over a share of their capacity: of sequences by our own bookings, of KV blocks by the engine's reports."""

    limit: float = attrs.field(default=0.95, validator=[v.gt(0), v.le(10)])
    """Share of `max_sequences` and of the KV cache at which a worker counts as full. Above 1 lets the engine queue."""
    max_age: float = attrs.field(default=10.0, validator=v.gt(0))
    """Seconds after which an engine's report says nothing any more."""
    needs = (IN_FLIGHT, MAX_SEQUENCES, ENGINE_KV_USAGE, ENGINE_REPORT_AGE)
    busy = True

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        no: dict[int, str] = {}
        limit, ages = self.limit, fleet[ENGINE_REPORT_AGE]
        for i, (sent, most, used) in enumerate(zip(fleet[IN_FLIGHT], fleet[MAX_SEQUENCES], fleet[ENGINE_KV_USAGE], strict=True)):
            if most and sent >= limit * most:
                no[i] = f"{sent} requests in progress of {most} sequences, limit {limit:.0%}"
            elif used >= limit and ages[i] <= self.max_age:
                no[i] = f"KV cache {used:.0%} in use, limit {limit:.0%}"
        return no
