"""Who is in the fleet of one router, and how well they are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import FollowsFleet, FollowsHealth, RoutingRequest, Worker
from dynamo_core.routing.decide import Part
from dynamo_core.routing.sources import Observer, Sources
from dynamo_core.types import Instance


@attrs.define
class _Member:
    instance: Instance
    card: ModelCard
    label: str
    proven: bool = False
    draining: bool = False
    inhibited_until: float = 0.0
    why: str = ""
    busy: bool = False
    """It is inhibited because it is full."""


class Roster(Sources):
    """The workers and their health. Providers that follow the fleet hear of every change."""

    def __init__(self, model: str, *, observer: Observer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(observer=observer, clock=clock)
        self.model = model
        self.on_change: Callable[[], None] | None = None
        """Called when a worker may have got room: a prefill or a request ended, a worker came, left or recovered."""
        self._members: dict[Worker, _Member] = {}
        self._labels: tuple[str, ...] = ()
        self._follow_fleet: tuple[Part, ...] = ()
        self._follow_health: tuple[Part, ...] = ()

    def replace(self, wanted: Sequence[Part]) -> None:
        super().replace(wanted)
        self._follow_fleet = self._those(FollowsFleet)
        self._follow_health = self._those(FollowsHealth)

    def _introduce(self, part: Part) -> None:
        super()._introduce(part)
        provider = part.component
        for worker, m in self._members.items():
            if isinstance(provider, FollowsFleet):
                self._safely(part, provider.joined, worker, m.instance, m.card)
            if isinstance(provider, FollowsHealth):
                self._tell((part,), lambda p, w=worker, m=m: p.health(w, proven=m.proven, draining=m.draining, inhibited_until=m.inhibited_until, why=m.why))

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    @property
    def workers(self) -> Sequence[Worker]:
        """Everyone who joined, ready or not, in row order."""
        return self._workers

    def label(self, worker: Worker) -> str:
        member = self._members.get(worker)
        return str(worker) if member is None else member.label

    def status(self) -> list[dict[str, Any]]:
        """Every worker with its health and all facts that this router knows of it, as plain data for people and programs."""
        now = self._clock()
        columns = self._columns(RoutingRequest("", self.model))
        return [
            {
                "worker": list(worker),
                "label": m.label,
                "proven": m.proven,
                "draining": m.draining,
                "inhibited": max(0.0, m.inhibited_until - now),
                "facts": {fact.name: _shown(column[row]) for fact, column in columns.items()},
            }
            for row, (worker, m) in enumerate((worker, self._members[worker]) for worker in self._workers)
        ]

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        """A worker is there. It gets requests once it is `proven`. One call for each data-parallel rank.

        Joining again brings another card; health and bookings stay.
        """
        label = instance.label + (f"/{worker.dp_rank}" if card.dp_size > 1 or worker.dp_rank else "")
        if (member := self._members.get(worker)) is None:
            self._members[worker] = _Member(instance, card, label)
        else:
            member.instance, member.card, member.label = instance, card, label
        self._renumber()
        self._tell(self._follow_fleet, lambda p: p.joined(worker, instance, card))
        self._say_health(worker)

    def left(self, worker: Worker) -> None:
        if self._members.pop(worker, None) is not None:
            self._renumber()
            self._tell(self._follow_fleet, lambda p: p.left(worker))
            self._changed()

    def proven(self, worker: Worker) -> None:
        """A canary request came back: the worker may serve."""
        if (member := self._members.get(worker)) is not None:
            member.proven = True
            self._say_health(worker)

    def draining(self, worker: Worker) -> None:
        """The worker is leaving: no new requests."""
        if (member := self._members.get(worker)) is not None:
            member.draining = True
            self._say_health(worker)

    def inhibit(self, worker: Worker, seconds: float, why: str, *, busy: bool = False) -> None:
        """Avoid the worker for a while; a longer inhibition that is already running stays. :param busy: it is well, and full."""
        if (member := self._members.get(worker)) is not None and (until := self._clock() + seconds) > member.inhibited_until:
            member.inhibited_until, member.why, member.busy = until, why, busy
            self._say_health(worker)

    def all_lost(self) -> bool:
        """Whether nobody is well, and somebody was until it failed a request a moment ago."""
        now = self._clock()
        lost = {worker for worker, m in self._members.items() if m.inhibited_until > now and not m.busy}
        return bool(lost) and all(worker in lost or m.draining or not m.proven for worker, m in self._members.items())

    def _say_health(self, worker: Worker) -> None:
        m = self._members[worker]
        self._changed()
        self._tell(self._follow_health, lambda p: p.health(worker, proven=m.proven, draining=m.draining, inhibited_until=m.inhibited_until, why=m.why))

    def _renumber(self) -> None:
        # In order of identity, so that equal fleets give equal rows, and the dice the same worker, whoever joined first.
        self._workers = tuple(sorted(self._members))
        self._labels = tuple(self._members[worker].label for worker in self._workers)


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)
