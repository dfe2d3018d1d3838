"""The discovery kit rejects stores that break a guarantee: each fault here is planted into a built-in store, which otherwise passes."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dynamo_core.contracts.discovery import DiscoveryContract
from dynamo_core.discovery.contract import Delete, Put, Resync, Synced
from dynamo_core.discovery.directory import Directory
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.discovery.memory import MemoryDiscovery, MemoryLease, _Shelf
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.errors import StoreUnavailable


class Memory(DiscoveryContract):
    ttl = 0.2


class HastyMemory(Memory):
    patience = 0.6


class File(DiscoveryContract):
    ttl = 1.0
    patience = 3.0

    def __init__(self, path):
        self.path = path

    @asynccontextmanager
    async def outage(self):
        self.path.rename(self.path.with_name("away"))
        yield
        self.path.with_name("away").rename(self.path)


async def rejections(kit, number, connect):
    """Which tests of this guarantee fail."""
    failed = []
    for name, test in inspect.getmembers(kit, inspect.iscoroutinefunction):
        if name.startswith(f"test_{number}_"):
            seeds = [{"seed": seed} for seed in range(4)] if "seed" in inspect.signature(test).parameters else [{}]
            for arguments in seeds:
                try:
                    await asyncio.wait_for(test(connect, **arguments), 20)
                except (Exception, pytest.fail.Exception):
                    failed.append(name)
    return failed


FAULTS = []


def breaks(number, *, kit="memory"):
    def note(plant):
        FAULTS.append(pytest.param(number, kit, plant, id=f"{number}: {plant.__name__.replace('_', ' ')}"))
        return plant

    return note


def wrap(monkeypatch, cls, name, around):
    original = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *a, **k: around(original, self, *a, **k))


@breaks("d1")
def values_are_stripped(patch):
    async def get(original, self, key):
        value = await original(self, key)
        return value and value.strip()

    wrap(patch, MemoryDiscovery, "get", get)


@breaks("d1")
def prefixes_match_whole_segments_only(patch):
    async def items(original, self, prefix):
        return {k: v for k, v in (await original(self, prefix)).items() if k[len(prefix) :][:1] in ("", "/") or prefix.endswith("/") or not prefix}

    wrap(patch, MemoryDiscovery, "items", items)


@breaks("d1")
def long_keys_are_cut(patch):
    wrap(patch, _Shelf, "put", lambda original, self, record: original(self, Put(record.key[:255], record.value, record.lease)))


@breaks("d2")
def a_watch_begins_with_the_future(patch):
    patch.setattr(Watcher, "_now", lambda self: iter([Synced()]))


@breaks("d2")
def a_watch_never_says_that_it_is_synced(patch):
    patch.setattr(Watcher, "_now", lambda self: (put for put in self._present() if put.key.startswith(self.prefix)))


@breaks("d2")
def changes_do_not_say_their_lease(patch):
    wrap(patch, Watcher, "push", lambda original, self, c: original(self, Put(c.key, c.value) if isinstance(c, Put) else c))


@breaks("d3")
def every_change_is_told_twice(patch):
    def twice(original, self, change):
        original(self, change)
        original(self, change)

    wrap(patch, Watcher, "push", twice)


@breaks("d3")
def deletions_are_sometimes_lost(patch):
    count = iter(range(10**6))
    wrap(patch, Watcher, "push", lambda original, self, c: original(self, c) if isinstance(c, Put) or next(count) % 5 else None)


@breaks("d3")
def a_deletion_is_told_before_it_is_done(patch):
    def delete(original, self, key):
        for watcher in self.watchers:
            if key in self.records:
                watcher.push(Delete(key))
                watcher.push(self.records[key])
        self.records.pop(key, None)

    wrap(patch, _Shelf, "delete", delete)


@breaks("d4")
def leases_never_expire(patch):
    patch.setattr(MemoryLease, "abandon", lambda self: None)


@breaks("d4")
def leases_expire_although_they_are_kept_alive(patch):
    def begin(original, self, shelf, ttl):
        original(self, shelf, ttl)
        self.abandon()

    wrap(patch, MemoryLease, "__init__", begin)


@breaks("d4")
def a_key_stays_with_its_first_lease(patch):
    def put(original, self, record):
        before = self.records.get(record.key)
        original(self, Put(record.key, record.value, before.lease) if before else record)

    wrap(patch, _Shelf, "put", put)


@breaks("d5")
def revoking_leaves_the_keys_to_the_ttl(patch):
    async def revoke(original, self):
        self.abandon()

    wrap(patch, MemoryLease, "revoke", revoke)


@breaks("d5")
def leaving_forgets_to_revoke(patch):
    async def leave(original, self, *exc):
        self._leases.clear()
        await original(self, *exc)

    wrap(patch, MemoryDiscovery, "__aexit__", leave)


@breaks("d5")
def a_revoked_lease_says_that_it_was_lost(patch):
    async def revoke(original, self):
        self._expire()

    wrap(patch, MemoryLease, "revoke", revoke)


@breaks("d6")
def an_expired_lease_is_revived_by_a_put(patch):
    async def put(original, self, key, value, lease=None):
        if lease is not None:
            self._shelf.leases.setdefault(lease.id, lease)
        await original(self, key, value, lease)

    wrap(patch, MemoryDiscovery, "put", put)


@breaks("d6")
def an_owner_is_not_told_that_its_lease_expired(patch):
    patch.setattr(MemoryLease, "_expire", lambda self: self._shelf.end(self.id) and None)


@breaks("d6", kit="file")
def a_late_write_is_refused_and_shown_all_the_same(patch):
    patch.setattr(Directory, "_counts", lambda self, record: True)
    patch.setattr(Directory, "_sweep", lambda self: None)
    patch.setattr(Directory, "end_lease", lambda self, lease: None)


@breaks("d7")
def deleting_nothing_is_an_error(patch):
    async def delete(original, self, key):
        del self._shelf.records[key]

    wrap(patch, MemoryDiscovery, "delete", delete)


@breaks("d7")
def deleting_nothing_is_told(patch):
    def delete(original, self, key):
        self.records.pop(key, None)
        for watcher in self.watchers:
            watcher.push(Delete(key))

    wrap(patch, _Shelf, "delete", delete)


@breaks("d8")
def a_slow_watcher_keeps_everything(patch):
    wrap(patch, Watcher, "__init__", lambda original, self, prefix, present: original(self, prefix, present, 10**9))


@breaks("d8")
def a_slow_watcher_loses_changes_silently(patch):
    wrap(patch, Watcher, "push", lambda original, self, change: original(self, change) if len(self._pending) < 4096 else None)


@breaks("d8")
def a_resync_forgets_the_present(patch):
    def now(original, self):
        return iter([Synced()]) if self._snapshot == type(self._snapshot)([Resync()]) else original(self)

    wrap(patch, Watcher, "_now", now)


@breaks("d8")
def a_watcher_that_crashes_takes_the_others_along(patch):
    @asynccontextmanager
    async def watch(original, self, prefix):
        try:
            async with original(self, prefix) as changes:
                yield changes
        except BaseException:
            self._shelf.watchers.clear()
            raise

    wrap(patch, MemoryDiscovery, "watch", watch)


@breaks("d9", kit="file")
def an_outage_looks_like_an_empty_store(patch):
    async def items(original, self, prefix):
        try:
            return await original(self, prefix)
        except StoreUnavailable:
            return {}

    wrap(patch, FileDiscovery, "items", items)


@breaks("d9", kit="file")
def an_outage_looks_like_a_deletion_to_watchers(patch):
    def refresh(original, self, *, thorough=False):
        try:
            return original(self, thorough=thorough)
        except OSError:
            gone, self._visible = list(self._visible), {}
            if not gone:
                raise
            return [Delete(key) for key in gone]

    wrap(patch, Directory, "refresh", refresh)


@breaks("d9", kit="file")
def nobody_says_that_the_backend_is_away(patch):
    patch.setattr(FileDiscovery, "problem", lambda self: None)


def kit_of(name, tmp_path: Path):
    if name == "memory":
        return HastyMemory(), MemoryDiscovery
    return File(tmp_path / "store"), lambda: FileDiscovery(tmp_path / "store", poll_interval=0.05)


@pytest.mark.parametrize(("number", "kit", "plant"), FAULTS)
async def test_the_kit_rejects_a_store_whose(number, kit, plant, monkeypatch, tmp_path):
    plant(monkeypatch)
    contract, connect = kit_of(kit, tmp_path)
    assert await rejections(contract, number, connect)


@pytest.mark.parametrize("number", [f"d{i}" for i in range(1, 10)])
async def test_the_kit_accepts_the_same_store_without_the_fault(number):
    assert await rejections(Memory(), number, MemoryDiscovery) == []


def test_every_guarantee_was_broken_at_least_once():
    assert {fault.values[0] for fault in FAULTS} == {f"d{i}" for i in range(1, 10)}
