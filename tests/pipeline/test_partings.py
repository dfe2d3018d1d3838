"""Workers that the store has lost, and workers that have left."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_core.errors import Unavailable
from dynamo_core.testing.cluster import Cluster, read_all


async def lose(cluster: Cluster) -> None:
    """Delete every record from the store, as if it had been wiped."""
    store = cluster.catalog._runtime.discovery
    for key in await store.items("v1/instances/"):
        await store.delete(key)


async def test_workers_that_the_store_lost_serve_on_and_the_loss_is_named() -> None:
    async with Cluster.up(workers=2) as cluster:
        await lose(cluster)
        async with asyncio.timeout(5):
            while len(cluster.catalog.problems()) < 2:
                await asyncio.sleep(0.01)
        assert all("discovery has lost it" in problem for problem in cluster.catalog.problems().values())
        assert (await read_all(await cluster.generate("hello", max_tokens=3)))[0] == "hel"


async def test_a_lost_worker_that_is_not_listed_again_goes_after_a_leases_time() -> None:
    async with Cluster.up(workers=1, lease_ttl=0.5) as cluster:
        model = cluster.model
        await lose(cluster)
        async with asyncio.timeout(10):
            while model.not_ready() is None:
                await asyncio.sleep(0.01)
        assert cluster.catalog.problems() == {}


async def test_a_lost_worker_that_is_listed_again_stays_as_it_was() -> None:
    async with Cluster.up(workers=1, lease_ttl=0.5) as cluster:
        store = cluster.catalog._runtime.discovery
        records = await store.items("v1/instances/")
        await lose(cluster)
        await asyncio.sleep(0.1)
        worker = cluster.members[0]
        assert worker is not None
        for key, value in records.items():
            await store.put(key, value, worker.runtime.lease)
        await asyncio.sleep(1.0)
        assert cluster.catalog.problems() == {}
        assert (await read_all(await cluster.generate("hello", max_tokens=3)))[0] == "hel"


async def test_a_worker_that_leaves_is_not_kept() -> None:
    async with Cluster.up(workers=1, lease_ttl=60.0) as cluster:
        await cluster.drain(0)
        async with asyncio.timeout(5):
            while cluster.catalog.models():
                await asyncio.sleep(0.01)
        with pytest.raises(Unavailable):
            cluster.catalog.get("echo")


async def test_a_lost_worker_that_leaves_afterwards_goes_at_once() -> None:
    """As a pod does: it is out of discovery first, and told to end a moment later."""
    async with Cluster.up(workers=1, lease_ttl=60.0) as cluster:
        await lose(cluster)
        async with asyncio.timeout(5):
            while not cluster.catalog.problems():
                await asyncio.sleep(0.01)
        await cluster.drain(0)
        async with asyncio.timeout(20):
            while cluster.catalog.models():
                await asyncio.sleep(0.01)
        assert cluster.catalog.problems() == {}


async def test_a_process_that_took_a_new_lease_is_one_worker() -> None:
    async with Cluster.up(workers=2, lease_ttl=60.0) as cluster:
        worker = cluster.members[0]
        assert worker is not None
        before = worker.runtime.id
        await worker.runtime.lease.revoke()
        worker.runtime.lease.lost.set()
        async with asyncio.timeout(10):
            while True:
                members = {w["id"]: w["proven"] for w in cluster.catalog.status()["models"]["echo"]["workers"]}
                if worker.runtime.id != before and members.get(f"{worker.runtime.id:016x}"):
                    break
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(cluster.catalog.status()["models"]["echo"]["workers"]) == 2
        assert cluster.catalog.problems() == {}
