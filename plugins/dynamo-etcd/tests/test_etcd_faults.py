"""What happens to the etcd store when etcd, or the network to it, does not do what it should."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from base64 import b64encode

import pytest

from dynamo_core.discovery.contract import Delete, Put, Resync, Synced
from dynamo_core.errors import LeaseLost, StoreUnavailable
from dynamo_core.testing.proxy import Proxy
from dynamo_etcd.store import EtcdDiscovery

GUARD = 30.0
QUICK = ("--heartbeat-interval", "20", "--election-timeout", "200")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(etcd_server):
    return etcd_server(options=QUICK)


@pytest.fixture
def etcd(server):
    server.start()  # if the test before left it down
    return server


@pytest.fixture
def store(etcd):
    prefix = f"faults-{next(_numbers)}/"
    return lambda **options: EtcdDiscovery(**{"endpoints": tuple(etcd.endpoints), "prefix": prefix, "timeout": 5.0, "ping_interval": 0.2, **options})


async def following(changes, until):
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


async def eventually(condition):
    async with asyncio.timeout(GUARD):
        while not condition():
            await asyncio.sleep(0.02)


# ---------------------------------------------------------------------- the server


async def test_a_server_that_is_killed_and_returns_ends_no_lease_and_no_watch(etcd, store) -> None:
    async with store() as here, store() as there, there.watch("k/") as changes:
        lease = await here.lease(2.0)
        await here.put("k/1", b"one", lease)
        await following(changes, {"k/1": b"one"})
        etcd.kill()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="etcd does not answer"):
            await here.put("k/2", b"", lease)
        assert time.monotonic() - started < GUARD
        assert "etcd does not answer: http://127.0.0.1:" in str(here.problem())
        await asyncio.to_thread(etcd.start)
        await eventually(lambda: here.problem() is None and there.problem() is None)
        await here.put("k/2", b"two", lease)
        assert await news(changes) == Put("k/2", b"two", lease.id)
        assert not lease.lost.is_set()


async def test_a_server_that_stands_still_is_unavailable_within_the_timeout(etcd, store) -> None:
    async with store(timeout=0.5) as here:
        await here.put("k/1", b"one")
        etcd.nodes[0].pause()
        try:
            with pytest.raises(StoreUnavailable, match="no answer within"):
                await asyncio.wait_for(here.get("k/1"), 5.0)
        finally:
            etcd.nodes[0].resume()
        await eventually(lambda: here.problem() is None)
        assert await here.get("k/1") == b"one"


async def test_a_compacted_store_loses_no_change(etcd, store) -> None:
    async with Proxy.before(etcd.endpoints[0]) as proxy, store() as here, store(endpoints=(proxy.url_of(etcd.endpoints[0]),)) as there:
        await here.put("k/1", b"one")
        await here.put("k/2", b"two")
        async with there.watch("k/") as changes:
            await following(changes, {"k/1": b"one", "k/2": b"two"})
            proxy.refusing = True
            proxy.cut()
            await here.delete("k/1")
            for i in range(20):
                await here.put("k/3", b"%d" % i)
            revision = int(etcd.call("kv/range", {"key": b64encode(b"x").decode()})["header"]["revision"])
            etcd.call("kv/compaction", {"revision": revision, "physical": True})
            proxy.refusing = False
            assert {await news(changes) for _ in range(2)} == {Delete("k/1"), Put("k/3", b"19")}


@pytest.mark.parametrize("grace", [60.0, pytest.param(6.0, marks=pytest.mark.slow)])
async def test_a_store_that_lost_its_data_keeps_its_fleet_while_that_registers_again(etcd, store, grace) -> None:
    async with store() as here, store(wiped_grace=grace) as there, there.watch("k/") as changes:
        lease = await here.lease(10.0)
        await here.put("k/old", b"me", lease)
        await following(changes, {"k/old": b"me"})
        etcd.kill()
        etcd.wipe()
        await asyncio.to_thread(etcd.start)
        await asyncio.wait_for(lease.lost.wait(), GUARD)  # long before the lease would have run out
        with pytest.raises(LeaseLost):
            await here.put("k/old", b"me", lease)
        again = await here.lease(10.0)
        await here.put("k/new", b"me", again)
        assert await news(changes) == Put("k/new", b"me", again.id), "the new record comes before the old one goes"
        if grace < GUARD:
            assert await news(changes) == Delete("k/old")


async def test_many_records_and_large_ones_are_read_in_pages_of_one_revision(store) -> None:
    async with store() as here:
        for start in range(0, 600, 50):
            await asyncio.gather(*(here.put(f"many/{i}", b"%d" % i) for i in range(start, start + 50)))
        assert await here.items("many/") == {f"many/{i}": b"%d" % i for i in range(600)}
        large = bytes(range(256)) * 4096
        for i in range(6):
            await here.put(f"large/{i}", large)
        assert await here.items("large/") == {f"large/{i}": large for i in range(6)}
        async with here.watch("large/") as changes:
            await following(changes, {f"large/{i}": large for i in range(6)})
            await here.put("large/7", large)
            assert await news(changes) == Put("large/7", large)


async def test_fleets_with_different_prefixes_do_not_see_each_other(store) -> None:
    async with store(prefix="blue/") as blue, store(prefix="blue/green/") as green:
        await blue.put("k", b"blue")
        await green.put("k", b"green")
        assert (await blue.get("k"), await green.get("k")) == (b"blue", b"green")
        async with green.watch("") as changes:
            await following(changes, {"k": b"green"})


# ---------------------------------------------------------------------- the network


async def test_a_partitioned_owner_is_gone_for_the_others_and_learns_it(etcd, store) -> None:
    async with Proxy.before(etcd.endpoints[0]) as proxy, store(endpoints=(proxy.url_of(etcd.endpoints[0]),), timeout=1.0) as here, store() as there:
        lease = await here.lease(1.0)
        await here.put("k/1", b"", lease)
        async with there.watch("k/") as changes:
            await following(changes, {"k/1": b""})
            proxy.blackhole()
            assert await news(changes) == Delete("k/1")
            assert not lease.lost.is_set(), "nobody can know yet"
            await eventually(lambda: here.problem() is not None)
            proxy.heal()
            await asyncio.wait_for(lease.lost.wait(), GUARD)
            with pytest.raises(LeaseLost):
                await here.put("k/1", b"late", lease)
            assert await there.items("k/") == {}


async def test_a_watch_through_a_dead_connection_goes_on_through_a_live_one(etcd, store) -> None:
    alive = etcd.endpoints[0]
    async with Proxy.before(alive) as proxy, store(endpoints=(proxy.url_of(alive), alive), timeout=2.0) as there, store() as here, there.watch("k/") as changes:
        await following(changes, {})
        proxy.blackhole()  # the connection stays open, and nothing comes
        await here.put("k/1", b"one")
        await following(changes, {"k/1": b"one"})
        await eventually(lambda: there.problem() is None)


async def test_a_slow_network_only_makes_it_slow(etcd, store) -> None:
    async with Proxy.before(etcd.endpoints[0]) as proxy, store(endpoints=(proxy.url_of(etcd.endpoints[0]),), timeout=5.0) as far, store() as near:
        proxy.delay = 0.1
        lease = await far.lease(2.0)
        async with far.watch("k/") as changes:
            await near.put("k/1", b"one")
            await following(changes, {"k/1": b"one"})
            await far.put("k/2", b"two", lease)
            await following(changes, {"k/2": b"two"})
        assert far.problem() is None


async def test_cutting_connections_again_and_again_loses_nothing(etcd, store) -> None:
    async with Proxy.before(etcd.endpoints[0]) as proxy, store(endpoints=(proxy.url_of(etcd.endpoints[0]),)) as there, store() as here, there.watch("k/") as changes:

        async def keep_cutting() -> None:
            while True:
                await asyncio.sleep(0.05)
                proxy.cut()

        cutting = asyncio.create_task(keep_cutting())
        for i in range(150):
            await here.put(f"k/{i % 10}", b"%d" % i)
            if i % 3 == 0:
                await here.delete(f"k/{(i + 5) % 10}")
            await asyncio.sleep(0.003)
        cutting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cutting
        await here.put("k/end", b"")
        assert not await following(changes, await here.items("k/"))


async def test_leaving_while_etcd_is_away_takes_a_bounded_time(etcd, store) -> None:
    async with Proxy.before(etcd.endpoints[0]) as proxy:
        async with store(endpoints=(proxy.url_of(etcd.endpoints[0]),), timeout=1.0) as here, here.watch("k/"):
            await here.lease()
            proxy.blackhole()
        with pytest.raises(StoreUnavailable, match="not open"):
            await here.get("k")
    assert {task for task in asyncio.all_tasks() if "discovery" in task.get_name()} == set()


# ---------------------------------------------------------------------- a cluster


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "paused"])
async def test_losing_the_leader_under_load_fails_no_put_and_loses_no_lease_and_no_change(etcd_server, fault) -> None:
    cluster = etcd_server(nodes=3, options=("--heartbeat-interval", "100", "--election-timeout", "1000"))
    leader = cluster.leader()
    # The leader is everybody's first endpoint: the worst case.
    endpoints = tuple(cluster.endpoints[leader:] + cluster.endpoints[:leader])
    async with EtcdDiscovery(endpoints, timeout=6.0) as here, EtcdDiscovery(endpoints, timeout=6.0) as there, there.watch("k/") as changes:
        lease = await here.lease(5.0)
        written = 0

        async def keep_writing() -> None:
            nonlocal written
            while True:
                await here.put(f"k/{written % 20}", b"%d" % written, lease)
                written += 1

        writing = asyncio.create_task(keep_writing())
        await eventually(lambda: written > 100)
        node = cluster.nodes[leader]
        node.kill() if fault == "killed" else node.pause()
        before = written
        try:
            await eventually(lambda: written > before + 200 or writing.done())
        finally:
            node.resume()
        assert not writing.done(), writing.exception()
        writing.cancel()
        await asyncio.wait([writing])
        await following(changes, await here.items("k/"))
        assert not lease.lost.is_set()


@pytest.mark.slow
async def test_without_a_majority_nothing_is_read_and_nothing_forgotten(etcd_server) -> None:
    cluster = etcd_server(nodes=3, options=QUICK)
    async with EtcdDiscovery(tuple(cluster.endpoints), timeout=1.0, ping_interval=0.2) as here, here.watch("k/") as changes:
        lease = await here.lease(2.0)
        await here.put("k/1", b"one", lease)
        await following(changes, {"k/1": b"one"})
        for node in cluster.nodes[:2]:
            node.kill()
        with pytest.raises(StoreUnavailable):
            await here.get("k/1")
        waiting = asyncio.ensure_future(news(changes))
        await asyncio.wait([waiting], timeout=4.0)  # twice the lease
        assert not waiting.done()
        await asyncio.to_thread(cluster.start)
        await eventually(lambda: here.problem() is None)
        assert await here.get("k/1") == b"one"
        await here.put("k/2", b"two", lease)
        assert await asyncio.wait_for(waiting, GUARD) == Put("k/2", b"two", lease.id)
