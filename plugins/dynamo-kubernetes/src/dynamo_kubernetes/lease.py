"""A lease that this process holds in the API server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager

from dynamo_core.ending import ended
from dynamo_core.errors import StoreUnavailable
from dynamo_kubernetes.api import MERGE_PATCH, NOT_FOUND, Kube, Refused, Unreachable
from dynamo_kubernetes.records import Claim, now

log = logging.getLogger(__name__)

_RETRY = 0.5
"""Seconds until a heartbeat that got no answer is sent again."""


class KubeLease:
    """The API server alone decides whether it is alive: it is while its object exists, whatever we believe.

    In a pod it needs no heartbeat: it lives as long as the container that its owner runs in. Elsewhere it is renewed every third of `ttl`.
    """

    def __init__(self, kube: Kube, path: str, claim: Claim, ended: Callable[[int], None], sweep: Callable[[int], Awaitable[None]]) -> None:
        self.id = claim.id
        self.ttl = claim.ttl
        """Whole seconds, as the API server keeps them."""
        self.claim = claim
        self.lost = asyncio.Event()
        self._kube = kube
        self._path = path
        self._ended = ended
        self._sweep = sweep
        self._revoked = False
        self._keeper = asyncio.create_task(self._keep_alive(), name=f"discovery: keep lease {claim.id:x} alive") if claim.pod is None else None

    async def revoke(self) -> None:
        if self._revoked or self.lost.is_set():
            return
        self._revoked = True
        await self.stop()
        with speaking(f"to revoke lease {self.id:x}"):
            try:
                await self._kube.call("DELETE", self._path)
            except Refused as e:
                if e.code != NOT_FOUND:
                    raise
            self._ended(self.id)
            await self._sweep(self.id)

    def abandon(self) -> None:
        """Stop keeping the lease alive, as a crash would: it expires after `ttl`."""
        if self._keeper is not None:
            self._keeper.cancel()

    def lose(self) -> None:
        """The API server does not know the lease any more."""
        if not self._revoked and not self.lost.is_set():
            self.lost.set()
            log.warning("lost lease %016x", self.id)
            self.abandon()
            self._ended(self.id)

    async def stop(self) -> None:
        """Leave the lease to itself."""
        await ended(self._keeper)

    async def _keep_alive(self) -> None:
        wait = self.ttl / 3
        while True:
            await asyncio.sleep(wait)
            wait = self.ttl / 3
            try:
                await self._kube.call("PATCH", self._path, {"spec": {"renewTime": now()}}, content_type=MERGE_PATCH)
            except Refused as e:
                if e.code == NOT_FOUND:
                    self.lose()
                    return
                log.warning("the API server refused a heartbeat of lease %016x: %s", self.id, e)
            except Unreachable:
                wait = min(_RETRY, self.ttl / 3)


@contextmanager
def speaking(what: str) -> Generator[None]:
    """Errors of the API server are the store's."""
    try:
        yield
    except Unreachable as e:
        raise StoreUnavailable(str(e)) from e
    except Refused as e:
        raise StoreUnavailable(f"the API server refused {what}: {e}") from e
