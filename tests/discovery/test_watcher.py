"""Whatever is done to a store, in whatever order, watchers tell exactly what a plain dictionary would."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.discovery.contract import Delete, Put, Resync, Synced
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.discovery.watcher import Watcher

KEYS = st.sampled_from(["a", "a/b", "a/c", "ab", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 2)),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("revoke"), st.integers(1, 2)),
        st.tuples(st.just("watch"), st.sampled_from(["", "a", "a/"])),
        st.tuples(st.just("read"), st.integers(0, 3)),
    ),
    max_size=60,
)


class Model:
    """A dictionary, and what each watcher must be told of it."""

    def __init__(self):
        self.records = {}
        self.watchers = []

    def put(self, key, value, lease):
        self.records[key] = (value, lease)
        self._tell(Put(key, value, lease))

    def delete(self, key):
        if self.records.pop(key, None) is not None:
            self._tell(Delete(key))

    def _tell(self, change):
        for prefix, told in self.watchers:
            if change.key.startswith(prefix):
                told.append(change)

    def watch(self, prefix):
        told = {Put(key, *rest) for key, rest in self.records.items() if key.startswith(prefix)}
        self.watchers.append((prefix, [told, Synced()]))


async def _play(steps):
    async with MemoryDiscovery("watcher-property") as store:
        model, leases, watches, heard = Model(), {1: await store.lease(), 2: await store.lease()}, [], []
        for number, (step, *what) in enumerate(steps):
            match step, what:
                case "put", [key, owner]:
                    lease = leases.get(owner)
                    await store.put(key, b"%d" % number, lease)
                    model.put(key, b"%d" % number, lease.id if lease else None)
                case "delete", [key]:
                    await store.delete(key)
                    model.delete(key)
                case "revoke", [owner]:
                    await leases[owner].revoke()
                    for key in [key for key, (_, lease) in list(model.records.items()) if lease == leases[owner].id]:
                        model.delete(key)
                    leases[owner] = await store.lease()
                case "watch", [prefix]:
                    watch = store.watch(prefix)
                    watches.append((watch, await watch.__aenter__()))
                    model.watch(prefix)
                    heard.append([])
                case "read", [index] if index < len(watches) and not done(heard[index], model.watchers[index][1]):
                    heard[index].append(await anext(watches[index][1]))
        for (watch, changes), got, (_, told) in zip(watches, heard, model.watchers, strict=True):
            while not done(got, told):
                got.append(await asyncio.wait_for(anext(changes), 5))
            present = len(told[0])
            assert {*got[:present]} == told[0]
            # One revocation deletes several keys at once, in no particular order; everything else is in order.
            assert in_order(got[present:]) == in_order(told[1:])
            await watch.__aexit__(None, None, None)


def done(got, told):
    return len(got) >= len(told[0]) + len(told) - 1


def in_order(changes):
    """Runs of deletions, sorted."""
    runs = []
    for change in changes:
        if isinstance(change, Delete) and runs and isinstance(runs[-1], list):
            runs[-1] = sorted([*runs[-1], change.key])
        else:
            runs.append([change.key] if isinstance(change, Delete) else change)
    return runs


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_watchers_tell_what_a_dictionary_would(steps):
    asyncio.run(_play(steps))


@given(st.lists(st.one_of(st.tuples(KEYS, st.booleans()), st.just(None)), max_size=80), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_a_mailbox_of_any_size_ends_up_with_the_present(steps, limit):
    """A step is a put or delete, or (None) one read."""

    async def play():
        records = {}
        watcher = Watcher("", lambda: list(records.values()), limit)
        watcher.start()
        heard = {}
        synced = 0

        async def read():
            nonlocal synced
            match await watcher.__anext__():
                case Put(key) as put:
                    assert heard.get(key) != put
                    heard[key] = put
                case Delete(key):
                    heard.pop(key, None)
                case Synced():
                    synced += 1
                case Resync():
                    heard.clear()

        for number, step in enumerate(steps):
            if step is None:
                if len(watcher._pending) or watcher._snapshot or watcher._behind:
                    await read()
                continue
            key, there = step
            if there:
                records[key] = Put(key, b"%d" % number)
                watcher.push(records[key])
            elif records.pop(key, None):
                watcher.push(Delete(key))
            assert len(watcher._pending) <= limit
        while watcher._pending or watcher._snapshot or watcher._behind:
            await read()
        assert heard == records
        assert synced

    asyncio.run(play())
