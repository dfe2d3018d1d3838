"""Requests for models that have no worker now, or none that is well: they wait here, bounded in number and time, and the fleet is told.

A model is known when a worker has offered it to this frontend before, or when somebody who can start workers of it says so (`ColdModel`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from dynamo_core.config.schema import Hold
from dynamo_core.discovery.contract import Delete, Put, Resync
from dynamo_core.ending import ended
from dynamo_core.errors import AllBusy, DynamoError, RequestError, StoreUnavailable, Unavailable
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.model import ServedModel
from dynamo_core.runtime import names
from dynamo_core.runtime.demand import ColdModel, Demand
from dynamo_core.runtime.runtime import Runtime

log = logging.getLogger(__name__)

PAUSE = 0.2
"""Seconds between two writes of the demand: a crowd is one record and not a thousand writes. And between two looks at workers that have failed."""


class HoldingRoom:
    """Implements `pipeline.contract.Holding`. Use `HoldingRoom.open`."""

    def __init__(self, runtime: Runtime, catalog: FleetCatalog, settings: Hold, registry: CollectorRegistry) -> None:
        self._runtime = runtime
        self._namespace = runtime.config.namespace
        self._catalog = catalog
        self._settings = settings
        self._cold: dict[str, ColdModel] = {}
        """By the key of the record: several processes may offer one model."""
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._since: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._held = Gauge("dynamo_frontend_held_requests", "Requests that wait for a model without a worker.", ["model"], registry=registry)
        self._outcomes = Counter("dynamo_frontend_held", "Requests that had to wait for a model without a worker, by what became of them.",
                                 ["model", "outcome"], registry=registry)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, runtime: Runtime, catalog: FleetCatalog, settings: Hold, registry: CollectorRegistry) -> AsyncGenerator[HoldingRoom]:
        room = cls(runtime, catalog, settings, registry)
        catalog.when_ready.append(room._look)
        tasks = [asyncio.create_task(room._follow(), name="cold models"), asyncio.create_task(room._publish(), name="demand")]
        try:
            yield room
        finally:
            catalog.when_ready.remove(room._look)
            await ended(*tasks)

    # -------------------------------------------------------------- what the frontend asks

    def known(self, name: str) -> str | None:
        """The model's own name, if it is one that requests may wait for."""
        for cold in self._cold.values():
            if name == cold.name or name in cold.aliases:
                return cold.name
        for model in self._catalog.offered().values():
            if name == model.name or name in model.card.aliases:
                return model.name
        return None

    def cold(self) -> list[str]:
        """Names of models that have no worker and can have one."""
        ready = {model.name for model in self._catalog.models()}
        return sorted({cold.name for cold in self._cold.values()} - ready)

    async def wait(self, name: str) -> ServedModel:
        """The model, once it serves.

        :raises Unavailable: nobody came in time. :raises AllBusy: too many wait already. :raises ModelNotFound: it was never known.
        """
        model = self.known(name)
        if model is None:
            return self._catalog.get(name)
        held = sum(map(len, self._waiting.values()))
        if held >= self._settings.limit:
            self._outcomes.labels(model, "full").inc()
            raise AllBusy(f"model {model!r}, which has no worker yet; {held} requests wait for one already, the limit", retry_after=self._settings.retry_after)
        outcome = "cancelled"
        try:
            async with asyncio.timeout(self._settings.max_wait):
                while True:
                    try:
                        served = self._catalog.get(name)
                    except (Unavailable, RequestError):
                        await self._turn(model)
                    else:
                        if served.lost() is None:
                            outcome = "served"
                            return served
                        # They are forgiven without an event.
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(PAUSE):
                                await self._turn(model)
        except TimeoutError:
            outcome = "timeout"
            raise Unavailable(self._why(name, model), retry_after=self._settings.retry_after) from None
        finally:
            self._outcomes.labels(model, outcome).inc()

    async def _turn(self, model: str) -> None:
        """Until something has become ready."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(model, [])
        waiting.append(ready)
        self._since.setdefault(model, time.time())
        self._count(model)
        try:
            await ready
        finally:
            waiting.remove(ready)
            if not waiting and self._waiting.get(model) is waiting:
                del self._waiting[model], self._since[model]
            self._count(model)

    def _why(self, name: str, model: str) -> str:
        try:
            lost = self._catalog.get(name).lost()
        except DynamoError as e:
            return f"model {model!r} has no worker, and none came within {self._settings.max_wait:g} s: {e}"
        if lost is not None:
            return f"{lost}; nobody took their place within {self._settings.max_wait:g} s"
        return f"model {model!r} has a worker only now"

    def _count(self, model: str) -> None:
        self._held.labels(model).set(len(self._waiting.get(model, ())))
        self._changed.set()

    def _look(self) -> None:
        """A worker serves: let those go on who waited for its model."""
        for model, waiting in self._waiting.items():
            with contextlib.suppress(Unavailable, RequestError):
                self._catalog.get(model)
                for ready in waiting:
                    if not ready.done():
                        ready.set_result(None)

    # -------------------------------------------------------------- what the fleet is told, and tells

    async def _publish(self) -> None:
        """Keep the records of demand in step with who waits."""
        published: set[str] = set()
        away = False
        while True:
            await self._changed.wait()
            self._changed.clear()
            for model in {*published, *self._waiting}:
                held, since = len(self._waiting.get(model, ())), self._since.get(model, 0.0)
                try:
                    if held:
                        await self._runtime.register(f"demand/{model}", self._record(Demand(model=model, held=held, since=since)))
                        published.add(model)
                    else:
                        await self._runtime.unregister(f"demand/{model}")
                        published.discard(model)
                    away = False
                except StoreUnavailable as e:
                    if not away:
                        log.warning("%d requests wait for model %s, and the store cannot be told: %s", held, model, e)
                    away = True
                    self._changed.set()
            await asyncio.sleep(PAUSE)

    def _record(self, demand: Demand) -> Callable[[int], tuple[str, bytes]]:
        return lambda id: (names.of_demand(self._namespace, demand.model, id), msgspec.json.encode(demand))

    async def _follow(self) -> None:
        decoder = msgspec.json.Decoder(ColdModel)
        while True:
            try:
                async with self._runtime.discovery.watch(names.cold(self._namespace)) as changes:
                    async for change in changes:
                        match change:
                            case Put(key, value):
                                with contextlib.suppress(msgspec.MsgspecError):
                                    self._cold[key] = decoder.decode(value)
                            case Delete(key):
                                self._cold.pop(key, None)
                            case Resync():
                                self._cold.clear()
                            case _:
                                pass
            except StoreUnavailable as e:
                log.warning("which models could be started is not known anew: %s", e)
            await asyncio.sleep(0.5)
