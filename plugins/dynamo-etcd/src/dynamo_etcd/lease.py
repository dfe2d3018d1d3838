"""A lease in etcd, kept alive by this process."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable

from dynamo_core.errors import StoreUnavailable
from dynamo_etcd.gateway import NOT_FOUND, Gateway, Refused
from dynamo_etcd.wire import Answer, Granted, KeptAlive, Remaining

log = logging.getLogger(__name__)

_RETRY = 0.5
"""Seconds until a heartbeat that got no answer is sent again."""


class EtcdLease:
    """etcd alone decides whether it is alive: while etcd is away nobody's lease ends, and one that ended is refused by etcd whatever we believe."""

    def __init__(self, gateway: Gateway, id: int, ttl: float, ended: Callable[[EtcdLease], None]) -> None:
        self.id = id
        self.ttl = ttl
        """What etcd granted: whole seconds, and no less than its election timeout allows."""
        self.lost = asyncio.Event()
        self._gateway = gateway
        self._ended = ended
        self._abandoned = False
        self._revoked = False
        self._hurry = asyncio.Event()
        self._keeper = asyncio.create_task(self._keep_alive(), name=f"discovery: keep lease {id:x} alive")

    @classmethod
    async def grant(cls, gateway: Gateway, ttl: float, ended: Callable[[EtcdLease], None]) -> EtcdLease:
        """:raises StoreUnavailable: no answer."""
        # Our own random id: an answer that is lost on its way, or a store that lost its data, never leads to one id for two leases.
        id = secrets.randbits(62) + 1
        granted = await gateway.call("lease/grant", {"ID": id, "TTL": math.ceil(ttl)}, Granted)
        return cls(gateway, id, float(granted.ttl), ended)

    async def revoke(self) -> None:
        if self._revoked or self.lost.is_set():
            return
        self._revoked = True
        self._stop()
        try:
            await self._gateway.call("lease/revoke", {"ID": self.id}, Answer)
        except Refused as e:
            if e.code != NOT_FOUND:
                raise StoreUnavailable(f"etcd did not revoke lease {self.id:x}: {e}") from e

    def abandon(self) -> None:
        """Stop keeping the lease alive, as a crash would: it expires after `ttl`."""
        self._abandoned = True

    def check(self) -> None:
        """Something happened to the store: ask now whether the lease is still there."""
        self._hurry.set()

    def lose(self) -> None:
        """etcd does not know the lease any more."""
        if not self._revoked and not self.lost.is_set():
            self.lost.set()
            log.warning("lost lease %016x", self.id)
            self._stop()

    def stop(self) -> None:
        """Leave the lease to itself."""
        self._keeper.cancel()

    def _stop(self) -> None:
        self._ended(self)
        self._keeper.cancel()

    async def _keep_alive(self) -> None:
        wait = self.ttl / 3
        while True:
            try:
                async with asyncio.timeout(wait):  # wait_for may swallow a cancellation
                    await self._hurry.wait()
            except TimeoutError:
                pass
            self._hurry.clear()
            try:
                if not await self._beat():
                    break
                wait = self.ttl / 3
            except (StoreUnavailable, Refused) as e:
                if isinstance(e, Refused):
                    log.warning("etcd refused a heartbeat of lease %016x: %s", self.id, e)
                wait = min(_RETRY, self.ttl / 3)
        self.lose()

    async def _beat(self) -> bool:
        """Whether the lease is still there."""
        if self._abandoned:
            return (await self._gateway.call("lease/timetolive", {"ID": self.id}, Remaining)).ttl > 0
        return (await self._gateway.call("lease/keepalive", {"ID": self.id}, KeptAlive)).result.ttl > 0
