"""What every discovery store must do: leased keys and values, watched by prefix.

The numbered guarantees are the specification; `dynamo_core.contracts.discovery` tests each under its number.

    D1  A value that was put is what `get` and `items` return, byte for byte.
    D2  A watcher receives one `Put` for each key that exists when it starts, then `Synced`, then changes, in order.
    D3  No change is delivered twice, none is lost, and the last event of a key tells its present state. Changes of one key
        that follow each other quickly may be merged into the last of them.
    D4  A key that was put under a lease disappears within `ttl` + 2 s after the lease stops being kept alive.
    D5  Revoking a lease deletes its keys at once.
    D6  A lease that expired never comes back: a `put` under it raises `LeaseLost`, and `lease.lost` is set.
    D7  Deleting an absent key is silent.
    D8  A crashed or slow watcher hurts nobody: memory is bounded, and a watcher that falls behind is resynchronised
        (it sees `Resync`, and then D2 again).
    D9  While the backend is away, calls raise `StoreUnavailable` and watchers wait; `problem()` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

import attrs

LEASE_TTL = 10.0
"""Seconds that a lease outlives its last heartbeat, by default."""


@attrs.frozen
class Put:
    key: str
    value: bytes
    lease: int | None = None


@attrs.frozen
class Delete:
    key: str


@attrs.frozen
class Synced:
    """Everything that existed when the watch began has been delivered."""


@attrs.frozen
class Resync:
    """Forget what you know: the present follows anew, closed by `Synced`."""


Change = Put | Delete | Synced | Resync


@runtime_checkable
class Lease(Protocol):
    """A claim to be alive. The store keeps it alive by itself until it is revoked or the process dies."""

    @property
    def id(self) -> int:
        """Unique in the store for ever, positive, below 2**63."""
        ...

    @property
    def ttl(self) -> float: ...

    @property
    def lost(self) -> asyncio.Event:
        """Set once the lease is known to be gone although nobody here revoked it."""
        ...

    async def revoke(self) -> None:
        """Delete the lease and its keys at once. Silent when it is gone already."""
        ...


@runtime_checkable
class Discovery(Protocol):
    """A leased key/value store. An async context manager: entering connects, leaving revokes its leases.

    Keys are `/`-separated printable ASCII, at most 512 characters; values at most 1 MiB.
    """

    async def __aenter__(self) -> Discovery: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def lease(self, ttl: float = LEASE_TTL) -> Lease: ...

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        """:raises LeaseLost: the lease is gone. :raises StoreUnavailable: no answer."""
        ...

    async def get(self, key: str) -> bytes | None: ...

    async def items(self, prefix: str) -> Mapping[str, bytes]: ...

    async def delete(self, key: str) -> None: ...

    def watch(self, prefix: str) -> AbstractAsyncContextManager[AsyncIterator[Change]]: ...

    def problem(self) -> str | None:
        """What is wrong with the connection to the backend now, or `None`. Cached state; no I/O."""
        ...
