"""LoRA: provider `adapters` (who has which adapter), filter `adapter` (who can serve it at all), scorer `adapter-affinity`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import Fact, Fleet, RoutingRequest, Worker
from dynamo_core.types import Instance

ADAPTER_POSSIBLE: Fact[bool] = Fact("adapter.possible", bool, "", "The worker can serve the adapter of the request; true for requests without one.")
ADAPTER_LOADED: Fact[bool] = Fact("adapter.loaded", bool, "", "The worker has the adapter of the request in memory, as far as this router knows.")


@attrs.define
class _Holder:
    fixed: frozenset[str] = frozenset()
    loads: bool = False
    recent: OrderedDict[str, None] = attrs.field(factory=OrderedDict)


@attrs.define
class Adapters:
    """From the cards (`adapter`, `runtime.adapters`, the capability `lora`), and from what was sent where."""

    slots: int = attrs.field(default=8, validator=v.ge(1))
    """Adapters that a worker keeps besides those on its card; the least recently used one goes."""
    provides = (ADAPTER_POSSIBLE, ADAPTER_LOADED)
    _of: dict[Worker, _Holder] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        named = card.runtime.get("adapters") or ()
        fixed = frozenset(str(name) for name in (*named, *((card.adapter,) if card.adapter else ())))
        self._of[worker] = _Holder(fixed, "lora" in card.capabilities)

    def left(self, worker: Worker) -> None:
        self._of.pop(worker, None)

    def chosen(self, request: RoutingRequest, worker: Worker) -> None:
        if request.adapter is not None and (holder := self._of.get(worker)) is not None and request.adapter not in holder.fixed:
            holder.recent[request.adapter] = None
            holder.recent.move_to_end(request.adapter)
            while len(holder.recent) > self.slots:
                holder.recent.popitem(last=False)

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Mapping[Fact[Any], Sequence[Any]]:
        if (name := request.adapter) is None:
            every = (True,) * len(workers)
            return {ADAPTER_POSSIBLE: every, ADAPTER_LOADED: every}
        holders = [self._of.get(worker) or _Holder() for worker in workers]
        return {
            ADAPTER_POSSIBLE: tuple([h.loads or name in h.fixed for h in holders]),
            ADAPTER_LOADED: tuple([name in h.fixed or name in h.recent for h in holders]),
        }


@attrs.frozen
class AdapterFilter:
    """Drops workers that cannot serve the adapter."""

    needs = (ADAPTER_POSSIBLE,)

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        if request.adapter is None:
            return {}
        return {i: f"it does not have the adapter {request.adapter!r}" for i, possible in enumerate(fleet[ADAPTER_POSSIBLE]) if not possible}


@attrs.frozen
class AdapterAffinity:
    """1 for workers that have the adapter in memory, 0 for those that would have to load it."""

    needs = (ADAPTER_LOADED,)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        return [1.0 if loaded else 0.0 for loaded in fleet[ADAPTER_LOADED]]
