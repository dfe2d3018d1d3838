"""Discovery in a directory that several processes share: nothing to install, good for one machine or one shared file system."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs
from attrs import validators as v

from dynamo_core.discovery.contract import LEASE_TTL, Change, Delete, Lease, Put
from dynamo_core.discovery.directory import Directory
from dynamo_core.discovery.limits import check_key, check_value
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.errors import LeaseLost, StoreUnavailable

T = TypeVar("T")
log = logging.getLogger(__name__)

_FAREWELL = 5.0
"""Seconds to wait for a file system that hangs, when leaving."""


class FileLease:
    """A lease that this process keeps alive by touching its file every third of `ttl`."""

    def __init__(self, store: FileDiscovery, id: int, ttl: float) -> None:
        self.id = id
        self.ttl = ttl
        self.lost = asyncio.Event()
        self.beaten = time.monotonic()
        """When the last heartbeat that arrived was sent."""
        self.abandoned = False
        self._store = store

    async def revoke(self) -> None:
        await self._store.end(self)

    def abandon(self) -> None:
        """Stop keeping the lease alive, as a crash would: it expires after `ttl`."""
        self.abandoned = True

    @property
    def overdue(self) -> bool:
        """Everybody may have given up on us. We notice before the others do: their clocks start when they see our heartbeat."""
        return time.monotonic() - self.beaten > self.ttl


@attrs.define(eq=False)
class FileDiscovery:
    """A store in a directory that all processes of the fleet can write to. Needs no server."""

    path: Path = Path(".dynamo/discovery")
    poll_interval: float = attrs.field(default=0.15, validator=v.gt(0))
    """Seconds between two looks at the directory; how late a watcher learns of a change."""

    _thread: ThreadPoolExecutor | None = attrs.field(init=False, default=None, repr=False)
    _directory: Directory = attrs.field(init=False, default=attrs.Factory(lambda self: Directory(self.path), takes_self=True), repr=False)
    _loop: asyncio.AbstractEventLoop = attrs.field(init=False, repr=False)
    _poll: asyncio.Task[None] = attrs.field(init=False, repr=False)
    _leases: dict[int, tuple[FileLease, asyncio.Task[None]]] = attrs.field(init=False, factory=dict, repr=False)
    _known: dict[str, Put] = attrs.field(init=False, factory=dict, repr=False)
    _watchers: set[Watcher] = attrs.field(init=False, factory=set, repr=False)
    _troubles: dict[str, str] = attrs.field(init=False, factory=dict, repr=False)

    # ------------------------------------------------------------------ opening and closing

    async def __aenter__(self) -> FileDiscovery:
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dynamo-discovery")
        try:
            await self._run("write", self._directory.create)
            await self._refresh(thorough=True)
        except BaseException:
            self._thread.shutdown(wait=False)
            self._thread = None
            raise
        self._poll = asyncio.create_task(self._keep_looking(), name="discovery: look at the directory")
        return self

    async def __aexit__(self, *exc: object) -> None:
        for lease, _ in list(self._leases.values()):
            try:
                await self.end(lease)
            except StoreUnavailable as e:
                log.warning("left a lease to expire by itself", extra={"lease": f"{lease.id:x}", "because": str(e)})
        self._poll.cancel()
        for watcher in self._watchers:
            watcher.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            last = self._loop.run_in_executor(thread, int)  # nothing may call the loop once we are gone
            await asyncio.wait([self._poll, last], timeout=_FAREWELL)
            thread.shutdown(wait=False)

    # ------------------------------------------------------------------ keys

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        check_key(key)
        check_value(key, value)
        if lease is None:
            await self._run("write", partial(self._write, key, bytes(value), None))
            return
        mine, _ = self._leases.get(lease.id, (None, None))
        if mine is not None and mine.overdue:
            self._lose(mine)
        if lease.lost.is_set():
            raise LeaseLost(f"lease {lease.id:x} expired, so {key!r} was not written under it")
        try:
            await self._run("write", partial(self._write, key, bytes(value), lease.id))
        except LeaseLost:
            if mine is not None:
                self._lose(mine)
            raise

    async def get(self, key: str) -> bytes | None:
        await self._refresh(thorough=True)
        record = self._known.get(key)
        return record.value if record else None

    async def items(self, prefix: str) -> Mapping[str, bytes]:
        await self._refresh(thorough=True)
        return {key: record.value for key, record in self._known.items() if key.startswith(prefix)}

    async def delete(self, key: str) -> None:
        await self._run("write", partial(self._remove, key))

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change], None]:
        watcher = Watcher(prefix, lambda: list(self._known.values()))
        self._watchers.add(watcher)
        try:
            try:
                await self._refresh(thorough=True)
            except StoreUnavailable:
                if self._thread is None:
                    raise
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def problem(self) -> str | None:
        return "; ".join([*self._troubles.values(), *(f"{self.path} has an unreadable record, {fault}" for fault in self._directory.faults)]) or None

    # ------------------------------------------------------------------ leases

    async def lease(self, ttl: float = LEASE_TTL) -> FileLease:
        lease = FileLease(self, secrets.randbits(62) + 1, ttl)
        await self._run("write", partial(self._directory.begin_lease, lease.id, ttl))
        self._leases[lease.id] = lease, asyncio.create_task(self._keep_alive(lease), name=f"discovery: keep lease {lease.id:x} alive")
        return lease

    async def end(self, lease: FileLease) -> None:
        """Revoke. Silent when the lease is gone already."""
        _, keeper = self._leases.pop(lease.id, (None, None))
        if keeper is not None:
            keeper.cancel()
            await self._run("write", partial(self._end_lease, lease.id))

    async def _keep_alive(self, lease: FileLease) -> None:
        while True:
            await asyncio.sleep(lease.ttl / 3)
            if lease.overdue:
                break
            if lease.abandoned:
                continue
            sent = time.monotonic()
            try:
                if not await self._run("write", partial(self._directory.beat, lease.id)):
                    break
                lease.beaten = sent
            except StoreUnavailable:
                continue
        self._lose(lease)

    def _lose(self, lease: FileLease) -> None:
        """Somebody may have declared us dead, so we are: say so, and take back what the others would only sweep later."""
        _, keeper = self._leases.pop(lease.id, (None, None))
        if keeper is None:
            return
        lease.lost.set()
        log.warning("lost a lease", extra={"lease": f"{lease.id:x}", "ttl": lease.ttl})
        keeper.cancel()
        if self._thread is not None:
            self._thread.submit(self._end_lost, lease.id)

    # ------------------------------------------------------------------ in the thread

    def _write(self, key: str, value: bytes, lease: int | None) -> None:
        self._directory.write(key, value, lease)
        self._look()

    def _remove(self, key: str) -> None:
        self._directory.remove(key)
        self._look()

    def _end_lease(self, lease: int) -> None:
        self._directory.end_lease(lease)
        self._look()

    def _end_lost(self, lease: int) -> None:
        try:
            self._directory.end_lease(lease)
        except OSError:
            pass  # the others sweep it

    def _look(self, *, thorough: bool = True) -> None:
        if changes := self._directory.refresh(thorough=thorough):
            self._loop.call_soon_threadsafe(self._deliver, changes)

    # ------------------------------------------------------------------ on the loop

    def _deliver(self, changes: list[Put | Delete]) -> None:
        for change in changes:
            if isinstance(change, Put):
                self._known[change.key] = change
            else:
                self._known.pop(change.key, None)
            for watcher in self._watchers:
                watcher.push(change)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(self.poll_interval)
            try:
                await self._refresh(thorough=False)
                if "write" in self._troubles:
                    await self._run("write", self._directory.try_to_write)
            except StoreUnavailable:
                continue  # told by `_run`; what is known stays in use

    async def _refresh(self, *, thorough: bool) -> None:
        await self._run("read", partial(self._look, thorough=thorough))
        for watcher in self._watchers:
            watcher.start()

    async def _run(self, what: str, work: Callable[[], T]) -> T:
        """Do something blocking in the store's thread. What it delivers arrives before this returns."""
        if self._thread is None:
            raise StoreUnavailable(f"the discovery directory {self.path} is not open")
        try:
            result = await self._loop.run_in_executor(self._thread, work)
        except OSError as e:
            trouble = f"cannot {what} the discovery directory {self.path}: {e.strerror or e}"
            if what not in self._troubles:
                log.warning("lost the discovery directory", extra={"path": str(self.path), "because": trouble})
            self._troubles[what] = trouble
            raise StoreUnavailable(trouble) from e
        if self._troubles.pop(what, None):
            log.warning("the discovery directory is back", extra={"path": str(self.path), "for": what})
        return result
