"""Discovery inside one process: for tests and for stacks that run in one process."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import attrs

from dynamo_core.discovery.contract import LEASE_TTL, Change, Delete, Lease, Put
from dynamo_core.discovery.limits import check_key, check_value
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.errors import LeaseLost, StoreUnavailable


class MemoryLease:
    """A lease that lives as long as the process, since both die together. `abandon` imitates a death."""

    def __init__(self, shelf: _Shelf, ttl: float) -> None:
        self.id = secrets.randbits(62) + 1
        self.ttl = ttl
        self.lost = asyncio.Event()
        self._shelf = shelf
        shelf.leases[self.id] = self

    async def revoke(self) -> None:
        self._shelf.end(self.id)

    def abandon(self) -> None:
        """Stop keeping the lease alive, as a crash would: it expires after `ttl`, by the clock of the event loop."""
        asyncio.get_running_loop().call_later(self.ttl, self._expire)

    def _expire(self) -> None:
        if self._shelf.end(self.id):
            self.lost.set()


@attrs.define(eq=False)
class _Shelf:
    """What all stores of one name and one event loop share."""

    users: int = 0
    records: dict[str, Put] = attrs.field(factory=dict)
    leases: dict[int, MemoryLease] = attrs.field(factory=dict)
    watchers: set[Watcher] = attrs.field(factory=set)

    def put(self, record: Put) -> None:
        self.records.pop(record.key, None)
        self.records[record.key] = record
        for watcher in self.watchers:
            watcher.push(record)

    def delete(self, key: str) -> None:
        if self.records.pop(key, None) is not None:
            for watcher in self.watchers:
                watcher.push(Delete(key))

    def end(self, lease: int) -> bool:
        """Whether there was such a lease."""
        if self.leases.pop(lease, None) is None:
            return False
        for key in [record.key for record in self.records.values() if record.lease == lease]:
            self.delete(key)
        return True


_shelves: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shelf]] = WeakKeyDictionary()


@attrs.define(eq=False)
class MemoryDiscovery:
    """A store shared by everybody who opens the same `name` on one event loop; it is forgotten when the last of them leaves."""

    name: str = "default"
    _shelf: _Shelf | None = attrs.field(init=False, default=None, repr=False)
    _leases: list[MemoryLease] = attrs.field(init=False, factory=list, repr=False)
    _watchers: set[Watcher] = attrs.field(init=False, factory=set, repr=False)

    async def __aenter__(self) -> MemoryDiscovery:
        self._shelf = _shelves.setdefault(asyncio.get_running_loop(), {}).setdefault(self.name, _Shelf())
        self._shelf.users += 1
        return self

    async def __aexit__(self, *exc: object) -> None:
        shelf = self._open()
        for lease in self._leases:
            await lease.revoke()
        for watcher in self._watchers:
            watcher.close()
        self._shelf = None
        shelf.users -= 1
        if not shelf.users:
            del _shelves[asyncio.get_running_loop()][self.name]

    async def lease(self, ttl: float = LEASE_TTL) -> MemoryLease:
        lease = MemoryLease(self._open(), ttl)
        self._leases.append(lease)
        return lease

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        check_key(key)
        check_value(key, value)
        shelf = self._open()
        if lease is not None and lease.id not in shelf.leases:
            raise LeaseLost(f"lease {lease.id:x} is gone, so {key!r} was not written under it")
        shelf.put(Put(key, bytes(value), lease.id if lease else None))

    async def get(self, key: str) -> bytes | None:
        record = self._open().records.get(key)
        return record.value if record else None

    async def items(self, prefix: str) -> Mapping[str, bytes]:
        return {key: record.value for key, record in self._open().records.items() if key.startswith(prefix)}

    async def delete(self, key: str) -> None:
        self._open().delete(key)

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change], None]:
        shelf = self._open()
        watcher = Watcher(prefix, lambda: list(shelf.records.values()))
        watcher.start()
        shelf.watchers.add(watcher)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            shelf.watchers.discard(watcher)
            self._watchers.discard(watcher)

    def problem(self) -> str | None:
        return None

    def _open(self) -> _Shelf:
        if self._shelf is None:
            raise StoreUnavailable(f"memory discovery {self.name!r} is not open")
        return self._shelf
