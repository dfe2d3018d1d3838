"""The process's place in the fleet: one lease, one server, and everything registered under them.

    async with Runtime.open(config, plugins) as runtime:
        await runtime.serve("backend", {"generate": handler})
        await runtime.register(instance_key, value)
        ...

A lost lease is never limped along with: the runtime takes a new one, tells the event plane, and registers everything
again under the new id; while it cannot, `problems()` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from dynamo_core import __version__
from dynamo_core.config import build
from dynamo_core.config.schema import Config
from dynamo_core.context import Context
from dynamo_core.discovery.contract import Discovery, Lease
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError, EndpointNotFound, LeaseLost
from dynamo_core.events.contract import EventContext, EventPlane, Publisher, Subscription
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.channels import Channels
from dynamo_core.transport.contract import Item, RequestPlane, Server
from dynamo_core.types import Instance

log = logging.getLogger(__name__)


class EndpointHandler(Protocol):
    """One endpoint of this process: payload in, items out."""

    def __call__(self, payload: bytes, context: Context) -> AsyncIterator[Item]: ...


class Runtime:
    """Use `Runtime.open`; leaving the context deregisters, then disconnects."""

    def __init__(self, config: Config, plugins: Plugins, discovery: Discovery, request_plane: RequestPlane, event_plane: EventPlane) -> None:
        self.config = config
        self.plugins = plugins
        self.discovery = discovery
        self.channels = Channels(request_plane)
        self.lease: Lease
        self._request_plane = request_plane
        self._event_plane = event_plane
        self._server: Server | None = None
        self._endpoints: dict[str, EndpointHandler] = {}
        self._records: dict[str, Callable[[int], tuple[str, bytes]]] = {}
        self._published: dict[str, str] = {}
        self._registering = asyncio.Lock()
        self._events_started = False
        self._lease_problem: str | None = None
        self._on_new_lease: list[Callable[[], Awaitable[None]]] = []
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: Config, plugins: Plugins) -> AsyncGenerator[Runtime]:
        discovery: Discovery = build(config.discovery, "discovery", plugins)
        runtime = cls(config, plugins, discovery, build(config.request_plane, "request_plane", plugins), build(config.event_plane, "event_plane", plugins))
        async with discovery:
            runtime.lease = await discovery.lease(config.lease_ttl)
            try:
                await runtime._start_events()
                runtime._keeper = asyncio.create_task(runtime._keep_lease(), name="lease")
                yield runtime
            finally:
                await runtime._close()

    @property
    def id(self) -> int:
        """The id of all instances of this process. It changes when the lease is lost and taken anew."""
        return self.lease.id

    # -------------------------------------------------------------- serving

    async def serve(self, component: str, endpoints: Mapping[str, EndpointHandler]) -> None:
        """Answer these endpoints of `component`. They become visible to others by `announce`."""
        for endpoint, handler in endpoints.items():
            self._endpoints[f"{self.config.namespace}.{component}.{endpoint}"] = handler
        if self._server is None:
            self._server = await self._request_plane.serve(self._dispatch, self.config.host)

    def _dispatch(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        handler = self._endpoints.get(endpoint)
        if handler is None:
            raise EndpointNotFound(f"this worker does not serve {endpoint!r}; it serves {', '.join(sorted(self._endpoints)) or 'nothing'}")
        return handler(payload, context)

    def instance(self, component: str, endpoint: str, id: int | None = None) -> Instance:
        """The record of one served endpoint."""
        assert self._server is not None, "serve before announcing"
        return Instance(id=self.id if id is None else id, namespace=self.config.namespace, component=component, endpoint=endpoint,
                        address=self._server.address, host=self.config.host, pid=os.getpid(), started=_STARTED, version=__version__)

    async def announce(self, component: str, endpoint: str, card: bytes | None = None) -> None:
        """Make an endpoint visible: its model card first, so that whoever sees the instance finds the card."""
        if card is not None:
            await self.register(f"card/{component}/{endpoint}", lambda id: (names.of_card(self.instance(component, endpoint, id)), card))
        await self.register(f"instance/{component}/{endpoint}", lambda id: _record(self.instance(component, endpoint, id)))

    def announces(self, component: str, endpoint: str) -> bool:
        """Whether this process means to be listed with this endpoint, whatever the store says at the moment."""
        return f"instance/{component}/{endpoint}" in self._records

    async def withdraw(self, component: str, endpoint: str) -> None:
        """Leave discovery; what is being served goes on."""
        await self.unregister(f"instance/{component}/{endpoint}")
        await self.unregister(f"card/{component}/{endpoint}")

    async def register(self, name: str, record: Callable[[int], tuple[str, bytes]]) -> None:
        """Put a record under the lease, and again under every later lease. `record(id)` returns key and value."""
        async with self._registering:
            self._records[name] = record
            with contextlib.suppress(LeaseLost):  # whoever keeps the lease puts every record again under the next one
                await self._put(name)

    async def unregister(self, name: str) -> None:
        async with self._registering:
            self._records.pop(name, None)
            if (key := self._published.pop(name, None)) is not None:
                with contextlib.suppress(DynamoError):
                    await self.discovery.delete(key)

    async def _put(self, name: str) -> None:
        key, value = self._records[name](self.lease.id)
        await self.discovery.put(key, value, self.lease)
        self._published[name] = key

    # -------------------------------------------------------------- events

    async def publisher(self, component: str, name: str) -> Publisher:
        return await self._event_plane.publisher(names.topic(self.config.namespace, component, name))

    async def subscribe(self, component: str, name: str) -> Subscription:
        return await self._event_plane.subscribe(names.topic(self.config.namespace, component, name))

    def on_new_lease(self, again: Callable[[], Awaitable[None]]) -> None:
        """Call `again` after the lease was lost and taken anew: publishers and subscriptions must be made again."""
        self._on_new_lease.append(again)

    async def _start_events(self) -> None:
        await self._event_plane.start(EventContext(self.discovery, self.lease, self.config.host))
        self._events_started = True

    # -------------------------------------------------------------- lease

    async def _keep_lease(self) -> None:
        while True:
            await self.lease.lost.wait()
            log.warning("lease %016x was lost; registering again", self.lease.id)
            self._lease_problem = "the lease was lost; registering again"
            delay = 0.2
            while True:
                try:
                    await self._renew()
                    break
                except Exception as e:
                    self._lease_problem = f"the lease was lost and a new one cannot be had: {e}"
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 5.0)
            self._lease_problem = None
            log.warning("registered again under lease %016x", self.lease.id)

    async def _renew(self) -> None:
        lease = await self.discovery.lease(self.config.lease_ttl)
        try:
            async with self._registering:
                self.lease = lease
                if self._events_started:
                    await self._event_plane.stop()
                await self._start_events()
                for again in self._on_new_lease:
                    await again()
                for name in list(self._records):
                    await self._put(name)
        except BaseException:
            # Half of our records under a lease that somebody keeps alive would be a ghost: the next attempt has a lease of its own.
            with contextlib.suppress(Exception):
                await lease.revoke()
            raise

    def problems(self) -> dict[str, str]:
        """Named degraded states of the planes; empty when all is well."""
        found = {"lease": self._lease_problem, "discovery": self.discovery.problem(), "events": self._event_plane.problem()}
        return {name: problem for name, problem in found.items() if problem}

    async def crash(self) -> None:
        """End as a killed process would, for tests: connections break, and nothing is deregistered."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._server is not None:
            await self._server.close()
        if (abandon := getattr(self.lease, "abandon", None)) is not None:
            abandon()

    async def _close(self) -> None:
        if self._keeper is not None:
            await ended(self._keeper)
        for name in list(self._records):
            await self.unregister(name)
        with contextlib.suppress(DynamoError):
            await self.lease.revoke()
        await self._event_plane.stop()
        if self._server is not None:
            await self._server.close()
        await self.channels.close()


def _record(instance: Instance) -> tuple[str, bytes]:
    return names.of_instance(instance), msgspec.json.encode(instance)


_STARTED = time.time()
