"""The workers' own reports, from the event plane."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.ending import ended
from dynamo_core.events.contract import Event
from dynamo_core.runtime.fleet import FleetWatch
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance, Load
from dynamo_planner.contract import WorkerReport
from dynamo_planner.observe.pages import StatusPages

log = logging.getLogger("dynamo.planner")

STALE = 60.0
"""Seconds after which a report is too old to count."""
ASK = 1.0
"""Seconds between two looks for workers that have not reported."""


@attrs.define(eq=False)
class _Known:
    instance: Instance
    role: str
    loads: dict[int, tuple[Load, float]] = attrs.field(factory=dict[int, "tuple[Load, float]"])
    """By rank: what it said, and when."""
    ranks: Sequence[int] = (0,)
    slots: int = 0


class WorkerReports:
    """Use `WorkerReports.open`. Workers are those of the namespace, of one model where it is named."""

    def __init__(self, runtime: Runtime, model: str | None, clock: Callable[[], float]) -> None:
        self._runtime, self._model, self._clock = runtime, model, clock
        self._workers: dict[int, _Known] = {}
        self._feeds: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, str] = {}
        self._decoder = msgspec.msgpack.Decoder(Load)
        self._pages = StatusPages(runtime.discovery, runtime.config.namespace)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, runtime: Runtime, model: str | None, clock: Callable[[], float]) -> AsyncGenerator[WorkerReports]:
        reports = cls(runtime, model, clock)
        watch = FleetWatch(runtime, reports.joined, reports.left)
        watching = asyncio.create_task(watch.run(), name="planner: watch workers")
        asking = asyncio.create_task(reports._ask_the_silent(), name="planner: ask silent workers")
        runtime.on_new_lease(reports._again)
        try:
            yield reports
        finally:
            await ended(watching, asking, *reports._feeds.values())
            await reports._pages.close()

    # -------------------------------------------------------------- who is there

    def joined(self, instance: Instance, card: ModelCard) -> None:
        if card.adapter is not None or (self._model is not None and self._model not in (card.name, *card.aliases)):
            return
        known = self._workers.setdefault(instance.id, _Known(instance, card.role))
        known.ranks = range(card.dp_start, card.dp_start + max(1, card.dp_size))
        known.slots = (card.max_sequences or 0) * len(known.ranks)
        if instance.component not in self._feeds:
            self._follow(instance.component)

    def left(self, instance: Instance) -> None:
        self._workers.pop(instance.id, None)

    # -------------------------------------------------------------- what they say

    def _follow(self, component: str) -> None:
        self._feeds[component] = asyncio.create_task(self._read(component), name=f"planner: loads of {component}")

    async def _again(self) -> None:
        """The event plane was started anew: every subscription of before is dead."""
        for component, task in list(self._feeds.items()):
            await ended(task)
            self._follow(component)

    async def _read(self, component: str) -> None:
        while True:
            try:
                subscription = await self._runtime.subscribe(component, "load")
                self._broken.pop(component, None)
                try:
                    async for notice in subscription:
                        if isinstance(notice, Event):
                            self._take(notice)
                finally:
                    await subscription.close()
            except Exception as e:
                if component not in self._broken:
                    log.warning("load reports of %s do not arrive: %s", component, e)
                self._broken[component] = f"the events of {component} do not arrive: {e}"
            await asyncio.sleep(0.5)

    def _take(self, event: Event) -> None:
        if (known := self._workers.get(event.publisher)) is not None:
            load = self._decoder.decode(event.payload)
            known.loads[load.dp_rank] = (load, self._clock())

    async def _ask_the_silent(self) -> None:
        """Engines report while they work. One that has been silent is asked at its status endpoint whether that is because it has nothing to do."""
        while True:
            for known in list(self._workers.values()):
                now = self._clock()
                if len(known.loads) < len(known.ranks) or any(now - when > STALE / 2 for _, when in known.loads.values()):
                    for rank, load in (await self._pages.loads(known.instance, known.ranks)).items():
                        known.loads[rank] = (load, now)
            await asyncio.sleep(ASK)

    def problems(self) -> Sequence[str]:
        return tuple(self._broken.values())

    def reports(self, at: float) -> Sequence[WorkerReport]:
        """One for each worker all of whose ranks have reported lately."""
        return tuple(_report(known) for known in self._workers.values()
                     if len(known.loads) >= len(known.ranks) and all(at - when < STALE for _, when in known.loads.values()))


def _report(known: _Known) -> WorkerReport:
    loads = [load for load, _ in known.loads.values()]
    used, total = sum(load.kv_used_blocks for load in loads), sum(load.kv_total_blocks for load in loads)
    return WorkerReport(
        known.instance.label, known.role, sum(load.running for load in loads), sum(load.waiting for load in loads),
        sum(load.waiting_prefill_tokens for load in loads), used / total if total else 0.0, known.slots, max(when for _, when in known.loads.values()),
    )
