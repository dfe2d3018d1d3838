"""Workers that discovery no longer lists: have they left, or has the store lost them?

Whoever leaves on purpose, or is dead, goes at once. But a store that was wiped, or that comes back from an outage longer than a lease,
drops the records of workers that have never stopped to serve. So the worker itself is asked; one that still means to be listed is kept
for as long as a lease lives, in which it must have registered again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dynamo_core.context import Context
from dynamo_core.errors import DynamoError
from dynamo_core.runtime import names
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that a worker has to answer."""
AGAIN = 0.5
"""Seconds after which one that is kept is asked anew: a pod is out of discovery before its worker is told to end."""


class Partings:
    """:param gone: called for each worker that has left, or was not listed again in time."""

    def __init__(self, runtime: Runtime, gone: Callable[[Instance], None]) -> None:
        self._runtime = runtime
        self._gone = gone
        self._asked: dict[tuple[int, str], tuple[Instance, asyncio.Task[None]]] = {}
        self._kept: set[str] = set()

    def ask(self, instance: Instance) -> None:
        """Discovery does not list it any more."""
        self._asked[instance.id, instance.endpoint] = instance, asyncio.create_task(self._ask(instance), name=f"ask {instance.label} whether it left")

    def listed(self, instance: Instance) -> None:
        """It is listed again, as it was."""
        self._end(instance)

    def serves(self, instance: Instance) -> None:
        """It has proven itself: what the same process was before, under a lease that it lost, is over."""
        for other, _ in list(self._asked.values()):
            if (other.address, other.endpoint) == (instance.address, instance.endpoint) and other.id != instance.id:
                self._end(other)
                self._gone(other)

    def problems(self) -> dict[str, str]:
        return {f"worker {label}": "discovery has lost it; it still serves, and should register again" for label in sorted(self._kept)}

    async def close(self) -> None:
        tasks = [task for _, task in self._asked.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, instance: Instance) -> None:
        self._kept.discard(instance.label)
        if (found := self._asked.pop((instance.id, instance.endpoint), None)) is not None:
            found[1].cancel()

    async def _ask(self, instance: Instance) -> None:
        try:
            await self._serving(instance)
            log.warning("discovery has lost worker %s, which still serves; it is kept for %g s", instance.label, self._runtime.config.lease_ttl)
            self._kept.add(instance.label)
            async with asyncio.timeout(self._runtime.config.lease_ttl):
                while True:
                    await asyncio.sleep(AGAIN)
                    await self._serving(instance)
        except (DynamoError, TimeoutError):
            pass  # it is gone, or says that it has left
        self._asked.pop((instance.id, instance.endpoint), None)
        self._kept.discard(instance.label)
        self._gone(instance)

    async def _serving(self, instance: Instance) -> None:
        """:raises DynamoError: it does not, or does not mean to. :raises TimeoutError: it does not answer."""
        endpoint = f"{instance.namespace}.{instance.component}.{names.PROBE}"
        await self._runtime.channels.call(instance.address, endpoint, instance.endpoint.encode(), Context("parting"), timeout=PATIENCE)
