"""What happens to the store in JetStream when NATS, or the network to it, does not do what it should."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from dynamo_core.discovery.contract import Delete, Put, Resync, Synced
from dynamo_core.errors import ConfigError, LeaseLost, StoreUnavailable
from dynamo_core.testing.proxy import Proxy
from dynamo_nats.discovery import NatsDiscovery

GUARD = 30.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(nats_server):
    return nats_server()


@pytest.fixture
def nats(server):
    server.start()  # if the test before left it down
    return server


@pytest.fixture
def store(nats):
    prefix = f"store-{next(_numbers)}"
    return lambda **options: NatsDiscovery(**{"servers": tuple(nats.servers), "prefix": prefix, "timeout": 5.0, **options})


async def following(changes, until) -> bool:
    """What a watcher knows once that is `until`, and whether it was ever told to forget."""
    known, forgot = {}, False
    async with asyncio.timeout(GUARD):
        while known != until:
            match await anext(changes):
                case Put(key, value):
                    known[key] = value
                case Delete(key):
                    known.pop(key, None)
                case Resync():
                    known.clear()
                    forgot = True
                case Synced():
                    pass
    return forgot


async def news(changes):
    """The next change; that the present is complete is none."""
    async with asyncio.timeout(GUARD):
        while (change := await anext(changes)) == Synced():
            pass
    return change


async def test_a_server_that_is_killed_and_returns_ends_no_lease_and_no_watch(nats, store, eventually) -> None:
    async with store() as here, store() as there, there.watch("k/") as changes:
        lease = await here.lease(1.0)
        await here.put("k/1", b"one", lease)
        await following(changes, {"k/1": b"one"})
        nats.kill()
        await eventually(lambda: here.problem() is not None)
        with pytest.raises(StoreUnavailable, match="no connection to NATS"):
            await here.put("k/2", b"", lease)
        await asyncio.sleep(1.5)  # longer than the lease: nobody could have kept it alive
        await asyncio.to_thread(nats.start)
        await eventually(lambda: here.problem() is None and there.problem() is None)
        await here.put("k/2", b"two", lease)
        assert await news(changes) == Put("k/2", b"two", lease.id)
        assert not lease.lost.is_set()


@pytest.mark.parametrize("grace", [60.0, pytest.param(6.0, marks=pytest.mark.slow)])
async def test_a_store_that_lost_its_data_keeps_its_fleet_while_that_registers_again(nats, store, grace) -> None:
    async with store() as here, store(wiped_grace=grace) as there, there.watch("k/") as changes:
        lease = await here.lease(10.0)
        await here.put("k/old", b"me", lease)
        await following(changes, {"k/old": b"me"})
        nats.kill()
        nats.wipe()
        await asyncio.to_thread(nats.start)
        await asyncio.wait_for(lease.lost.wait(), GUARD)
        with pytest.raises(LeaseLost):
            await here.put("k/old", b"me", lease)
        again = await here.lease(10.0)
        await here.put("k/new", b"me", again)
        assert await news(changes) == Put("k/new", b"me", again.id), "the new record comes before the old one goes"
        if grace < GUARD:
            assert await news(changes) == Delete("k/old")


async def test_a_partitioned_owner_is_gone_for_the_others_and_learns_it(nats, store) -> None:
    async with Proxy.before(nats.servers[0]) as proxy, store(servers=(proxy.url_of(nats.servers[0]),)) as here, store() as there:
        lease = await here.lease(1.0)
        await here.put("k/1", b"", lease)
        async with there.watch("k/") as changes:
            await following(changes, {"k/1": b""})
            proxy.blackhole()
            assert await news(changes) == Delete("k/1")
            assert not lease.lost.is_set(), "nobody can know yet"
            proxy.heal()
            await asyncio.wait_for(lease.lost.wait(), GUARD)
            with pytest.raises(LeaseLost):
                await here.put("k/1", b"late", lease)
            assert await there.items("k/") == {}


async def test_connections_that_are_cut_again_and_again_lose_nothing(nats, store) -> None:
    async with Proxy.before(nats.servers[0]) as proxy, store(servers=(proxy.url_of(nats.servers[0]),)) as there, store() as here, there.watch("k/") as changes:
        for i in range(150):
            await here.put(f"k/{i % 10}", b"%d" % i)
            if i % 3 == 0:
                await here.delete(f"k/{(i + 5) % 10}")
            if i % 40 == 20:
                proxy.cut()
            await asyncio.sleep(0.003)
        assert not await following(changes, await here.items("k/"))


async def test_who_comes_later_knows_the_same(store) -> None:
    async with store() as here:
        lease, other = await here.lease(), await here.lease()
        await here.put("k/1", b"old", lease)
        await here.put("k/1", b"new", other)
        await here.put("k/2", b"", lease)
        await here.put("k/3", b"")
        await here.delete("k/3")
        await lease.revoke()
        async with store() as late:
            assert await late.items("") == await here.items("") == {"k/1": b"new"}


async def test_without_jetstream_the_operator_is_told(nats_server) -> None:
    nats = nats_server(jetstream=False)
    with pytest.raises(ConfigError, match="turn JetStream on"):
        async with NatsDiscovery(servers=tuple(nats.servers)):
            pass


async def test_an_absent_server_is_named() -> None:
    with pytest.raises(StoreUnavailable, match=r"nats://127\.0\.0\.1:9"):
        async with NatsDiscovery(servers=("nats://127.0.0.1:9",), connect_timeout=0.5):
            pass


async def test_leaving_leaves_nothing_running(store) -> None:
    before = asyncio.all_tasks()
    async with store() as here, here.watch("k/"):
        await here.put("k", b"", await here.lease())
    assert {task.get_name() for task in asyncio.all_tasks() - before if not task.done()} == set()


@pytest.mark.slow
async def test_losing_any_server_of_three_loses_no_lease_and_no_change(nats_server, eventually) -> None:
    cluster = nats_server(nodes=3)
    here, there = (NatsDiscovery(servers=(first, *cluster.servers), replicas=3, timeout=5.0) for first in cluster.servers[:2])
    async with here, there, there.watch("k/") as changes:
        lease = await here.lease(5.0)
        for node in cluster.nodes:
            node.kill()
            written = 0
            async with asyncio.timeout(GUARD):
                while written < 50:
                    try:
                        await here.put(f"k/{written}", str(node).encode(), lease)
                        written += 1
                    except StoreUnavailable:
                        await asyncio.sleep(0.1)
            await asyncio.to_thread(cluster.start)
        await eventually(lambda: there.problem() is None)
        await following(changes, await here.items("k/"))
        assert not lease.lost.is_set()


async def test_a_reader_that_is_told_of_an_older_end_reads_on_to_the_present_and_forgets_nobody(store, eventually, monkeypatch) -> None:
    """A server that just came back, or a leader that just changed, may not know yet what the others have."""
    async with store() as here, store() as there, there.watch("k/") as changes:
        lease = await here.lease(30.0)
        records = {f"k/{n}": b"%d" % n for n in range(30)}
        for key, value in records.items():
            await here.put(key, value, lease)
        await following(changes, records)
        ensure, asked = there._stream.ensure, []

        async def outdated():
            info = await ensure()
            info.state.messages = info.state.last_seq = 0
            asked.append(info)
            return info

        monkeypatch.setattr(there._stream, "ensure", outdated)
        there._reader._broken.set()
        await eventually(lambda: asked and there._ledger.complete)
        await here.put("k/last", b"", lease)
        assert await news(changes) == Put("k/last", b"", lease.id)
        assert set(await there.items("k/")) == {*records, "k/last"}
