"""Brings the fleet's events (load, KV cache) to the routers that follow them."""

from __future__ import annotations

import asyncio
import logging

from dynamo_core.ending import ended
from dynamo_core.events.contract import Event, Gap, Subscription
from dynamo_core.routing.router import Router
from dynamo_core.runtime.runtime import Runtime

log = logging.getLogger(__name__)


class EventFeeds:
    """One subscription for each component and topic, shared by the routers that want it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._routers: dict[tuple[str, str], list[Router]] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._broken: dict[str, str] = {}
        runtime.on_new_lease(self._again)

    def add(self, router: Router, component: str) -> None:
        """Feed `router` with what the workers of `component` publish on the topics that its facts follow."""
        for topic in router.event_topics():
            key = (component, topic)
            routers = self._routers.setdefault(key, [])
            if router not in routers:
                routers.append(router)
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._follow(*key), name=f"feed {component}/{topic}")

    async def _follow(self, component: str, topic: str) -> None:
        name, delay = f"{component}/{topic}", 0.2
        while True:
            try:
                subscription = await self._runtime.subscribe(component, topic)
                self._broken.pop(name, None)
                delay = 0.2
                try:
                    await self._deliver(subscription, self._routers[component, topic], topic)
                finally:
                    await subscription.close()
            except Exception as e:
                if name not in self._broken:
                    log.exception("events of %s do not arrive; trying again", name)
                self._broken[name] = f"events do not arrive: {e}"
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)

    async def _deliver(self, subscription: Subscription, routers: list[Router], topic: str) -> None:
        async for notice in subscription:
            match notice:
                case Event(publisher, _, _, payload):
                    for router in routers:
                        router.on_event(topic, publisher, payload)
                case Gap(publisher, _, missed):
                    for router in routers:
                        router.on_gap(topic, publisher, missed)
                case _:
                    pass

    async def _again(self) -> None:
        """The event plane was started anew: every subscription of before is dead."""
        for key, task in list(self._tasks.items()):
            task.cancel()
            self._tasks[key] = asyncio.create_task(self._follow(*key), name=f"feed {key[0]}/{key[1]}")

    def problems(self) -> dict[str, str]:
        return {f"events {name}": why for name, why in self._broken.items()}

    async def close(self) -> None:
        await ended(*self._tasks.values())
