"""Models without workers: who says that one can be had, and who asks for it. Records in the discovery store, each under its writer's lease.

Whoever can start workers of a model leaves a `ColdModel`, so that frontends know the name while nothing serves it. A frontend that holds requests for a model
leaves a `Demand`, so that whoever can start workers knows that somebody waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.discovery.contract import LEASE_TTL, Discovery, Lease
from dynamo_core.errors import LeaseLost, StoreUnavailable
from dynamo_core.runtime import names


class ColdModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Workers of this model can be started."""

    name: str
    aliases: tuple[str, ...] = ()


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that one frontend holds for one model."""

    model: str
    held: int
    since: float
    """Unix time from which on at least one was held."""


async def held(discovery: Discovery, namespace: str) -> dict[str, int]:
    """Requests that wait for a worker, by model, of all frontends. :raises StoreUnavailable: it cannot be known."""
    found: dict[str, int] = {}
    for value in (await discovery.items(names.demand(namespace))).values():
        with contextlib.suppress(msgspec.MsgspecError):
            demand = msgspec.json.decode(value, type=Demand)
            found[demand.model] = found.get(demand.model, 0) + demand.held
    return found


def cold_models(cards: Iterable[bytes]) -> list[ColdModel]:
    """What workers with these cards serve, and could serve again."""
    found: dict[str, ColdModel] = {}
    for value in cards:
        with contextlib.suppress(msgspec.MsgspecError):
            card = msgspec.json.decode(value, type=ModelCard)
            if card.adapter is None:
                found[card.name] = ColdModel(name=card.name, aliases=card.aliases)
    return [*found.values()]


class ColdModels:
    """Keeps the records of the models that this process can start workers of. They go with it."""

    def __init__(self, discovery: Discovery, namespace: str, ttl: float = LEASE_TTL) -> None:
        self._discovery = discovery
        self._namespace = namespace
        self._ttl = ttl
        self._lease: Lease | None = None
        self._offered: dict[str, ColdModel] = {}

    async def offer(self, models: Sequence[ColdModel]) -> None:
        """From now on these as well. Call it now and then: a lost lease is replaced here. :raises StoreUnavailable: nothing was offered."""
        if self._lease is None or self._lease.lost.is_set():
            self._lease = await self._discovery.lease(self._ttl)
            models = [*{**self._offered, **{model.name: model for model in models}}.values()]
            self._offered = {}
        for model in models:
            if self._offered.get(model.name) != model:
                with contextlib.suppress(LeaseLost):  # the next call takes another one
                    await self._discovery.put(names.of_cold(self._namespace, model.name, self._lease.id), msgspec.json.encode(model), self._lease)
                self._offered[model.name] = model

    async def close(self) -> None:
        if self._lease is not None:
            with contextlib.suppress(StoreUnavailable):  # the records go when the lease runs out
                await self._lease.revoke()
