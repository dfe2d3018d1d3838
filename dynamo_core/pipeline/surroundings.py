"""Gives fact providers that talk to the fleet what they need, for as long as their router uses them."""

from __future__ import annotations

import asyncio
import logging

import attrs
from prometheus_client import CollectorRegistry, Gauge

from dynamo_core.cards import Role
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.events.contract import Publisher, Subscription
from dynamo_core.routing.contract import Attached, Reports
from dynamo_core.routing.decide import Part
from dynamo_core.routing.router import Router
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.shared_secret import shared_secret
from dynamo_core.types import Instance

log = logging.getLogger(__name__)


@attrs.frozen
class FleetSurroundings:
    """Implements `routing.contract.Surroundings`."""

    _runtime: Runtime
    component: str
    model: str
    role: Role

    @property
    def id(self) -> int:
        return self._runtime.id

    @property
    def namespace(self) -> str:
        return self._runtime.config.namespace

    async def call(self, instance: Instance, endpoint: str, payload: bytes, *, timeout: float) -> list[bytes]:
        path = f"{instance.namespace}.{instance.component}.{endpoint}"
        items = await self._runtime.channels.call(instance.address, path, payload, Context(f"{self.model} {endpoint}"), timeout=timeout)
        return [item for item in items if isinstance(item, bytes)]

    async def publisher(self, topic: str) -> Publisher:
        return await self._runtime.publisher(self.component, topic)

    async def subscribe(self, topic: str) -> Subscription:
        return await self._runtime.subscribe(self.component, topic)

    async def secret(self, name: str) -> bytes:
        return await shared_secret(self._runtime, name)


class Attachments:
    """Which providers of which routers are attached; `follow` again after a router's stack was swapped."""

    def __init__(self, runtime: Runtime, registry: CollectorRegistry) -> None:
        self._runtime = runtime
        self._attached: dict[Router, dict[Part, tuple[FleetSurroundings, asyncio.Task[None]]]] = {}
        self._failed: dict[str, str] = {}
        runtime.on_new_lease(self._again)
        degraded = Gauge("dynamo_router_degraded", "Degraded states that fact providers report now; /health names them.", registry=registry)
        degraded.set_function(lambda: len(self.problems()))

    def follow(self, router: Router, component: str) -> None:
        """Attach the providers of `router` that want it, and detach those that it has no more."""
        attached = self._attached.setdefault(router, {})
        for part in [part for part in attached if part not in router.providers]:
            attached.pop(part)[1].cancel()
        for part in router.providers:
            if part not in attached and isinstance(part.component, Attached):
                attached[part] = self._start(part, FleetSurroundings(self._runtime, component, router.model, router.role))

    def _start(self, part: Part, surroundings: FleetSurroundings) -> tuple[FleetSurroundings, asyncio.Task[None]]:
        return surroundings, asyncio.create_task(self._keep(part, surroundings), name=f"attach {part.name}")

    async def _keep(self, part: Part, surroundings: FleetSurroundings) -> None:
        """Attached until cancelled. What cannot be attached is tried again."""
        provider: Attached = part.component
        delay = 0.2
        while True:
            try:
                await provider.attach(surroundings)
                self._failed.pop(part.name, None)
                await asyncio.Event().wait()
            except Exception as e:
                if part.name not in self._failed:
                    log.warning("%s cannot be attached to the fleet, trying again: %s", part.name, e)
                self._failed[part.name] = f"not attached to the fleet: {e}"
            finally:
                await provider.detach()
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)

    async def _again(self) -> None:
        """The lease is a new one: publishers and subscriptions of before are dead."""
        for attached in self._attached.values():
            for part, (surroundings, task) in list(attached.items()):
                await ended(task)
                attached[part] = self._start(part, surroundings)

    def problems(self) -> dict[str, str]:
        found = dict(self._failed)
        for attached in self._attached.values():
            for part in attached:
                if isinstance(part.component, Reports):
                    found.update(part.component.problems())
        return found

    async def close(self) -> None:
        await ended(*(task for attached in self._attached.values() for _, task in attached.values()))
