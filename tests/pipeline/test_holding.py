"""Requests for models without workers, with real workers that come and go in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Hold
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.ending import ended
from dynamo_core.errors import AllBusy, ModelNotFound, Unavailable
from dynamo_core.pipeline.holding import HoldingRoom
from dynamo_core.runtime.demand import ColdModel, ColdModels, held
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster


class House:
    """A cluster, a holding room over its catalog, and somebody else's view of the store."""

    def __init__(self, cluster: Cluster, room: HoldingRoom, registry: CollectorRegistry, store: MemoryDiscovery) -> None:
        self.cluster, self.room, self.registry, self.store = cluster, room, registry, store

    async def demand(self, expected: dict[str, int]) -> None:
        async with asyncio.timeout(10):
            while await held(self.store, "dynamo") != expected:
                await asyncio.sleep(0.01)

    async def unready(self) -> None:
        async with asyncio.timeout(10):
            while self.cluster.catalog.models():
                await asyncio.sleep(0.01)

    async def known(self, name: str) -> None:
        async with asyncio.timeout(10):
            while self.room.known(name) is None:
                await asyncio.sleep(0.01)

    def outcomes(self, outcome: str, model: str = "echo") -> float:
        return self.registry.get_sample_value("dynamo_frontend_held_total", {"model": model, "outcome": outcome}) or 0.0


@contextlib.asynccontextmanager
async def house(*, workers: int = 1, **options: float) -> AsyncGenerator[House]:
    registry = CollectorRegistry()
    async with Cluster.up(workers=workers) as cluster, Runtime.open(cluster.config, cluster.plugins) as runtime:
        async with HoldingRoom.open(runtime, cluster.catalog, Hold(**options), registry) as room:  # type: ignore[arg-type]
            async with MemoryDiscovery(cluster.config.discovery.options["name"]) as store:
                yield House(cluster, room, registry, store)


async def test_a_request_for_a_model_that_lost_its_last_worker_waits_for_the_next_one() -> None:
    async with house() as it:
        await it.cluster.drain(0)
        await it.unready()
        waiting = [asyncio.create_task(it.room.wait("echo")) for _ in range(3)]
        await it.demand({"echo": 3})
        assert it.registry.get_sample_value("dynamo_frontend_held_requests", {"model": "echo"}) == 3
        await it.cluster.add()
        async with asyncio.timeout(20):
            assert {model.name for model in await asyncio.gather(*waiting)} == {"echo"}
        await it.demand({})
        assert it.registry.get_sample_value("dynamo_frontend_held_requests", {"model": "echo"}) == 0
        assert it.outcomes("served") == 3


async def test_a_model_that_never_ran_is_known_from_whoever_can_start_it() -> None:
    async with house(workers=0) as it:
        with pytest.raises(Unavailable, match="no model is registered"):
            await it.room.wait("echo")
        cold = ColdModels(it.store, "dynamo")
        await cold.offer([ColdModel(name="echo", aliases=("parrot",))])
        await it.known("parrot")
        assert it.room.cold() == ["echo"]
        waiting = asyncio.create_task(it.room.wait("echo"))
        await it.demand({"echo": 1})
        await it.cluster.add()
        async with asyncio.timeout(20):
            assert (await waiting).name == "echo"
        assert it.room.cold() == [], "what serves is not cold"
        await cold.close()


async def test_a_cold_model_is_forgotten_with_whoever_could_start_it() -> None:
    async with house(workers=0) as it:
        cold = ColdModels(it.store, "dynamo")
        await cold.offer([ColdModel(name="echo")])
        await it.known("echo")
        await cold.close()
        async with asyncio.timeout(10):
            while it.room.cold():
                await asyncio.sleep(0.01)


async def test_a_cold_model_is_offered_again_when_the_lease_was_lost() -> None:
    async with house(workers=0) as it:
        cold = ColdModels(it.store, "dynamo", ttl=0.1)
        await cold.offer([ColdModel(name="echo")])
        assert cold._lease is not None
        cold._lease.abandon()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            await cold._lease.lost.wait()
        assert await it.store.items("v1/cold/") == {}
        await cold.offer([])
        await it.known("echo")
        await cold.close()


async def test_a_worker_of_another_model_releases_nobody() -> None:
    async with house() as it:
        await it.cluster.drain(0)
        await it.unready()
        waiting = asyncio.create_task(it.room.wait("echo"))
        await it.demand({"echo": 1})
        since = it.room._since["echo"]
        await it.cluster.add(served_name="other")
        async with asyncio.timeout(20):
            while not it.cluster.catalog.models():
                await asyncio.sleep(0.01)
        assert not waiting.done()
        assert it.room._since["echo"] == since
        await ended(waiting)
        assert it.outcomes("cancelled") == 1
        await it.demand({})


async def test_nobody_waits_longer_than_the_limit_says() -> None:
    async with house(max_wait=0.1, retry_after=7.0) as it:
        await it.cluster.drain(0)
        await it.unready()
        with pytest.raises(Unavailable, match=r"model 'echo' has no worker, and none came within 0\.1 s") as error:
            await it.room.wait("echo")
        assert error.value.retry_after == 7.0
        assert it.outcomes("timeout") == 1


async def test_one_more_than_the_limit_is_turned_away() -> None:
    async with house(limit=2) as it:
        await it.cluster.drain(0)
        await it.unready()
        waiting = [asyncio.create_task(it.room.wait("echo")) for _ in range(2)]
        await it.demand({"echo": 2})
        with pytest.raises(AllBusy, match="2 requests wait for one already"):
            await it.room.wait("echo")
        await ended(*waiting)
        assert it.outcomes("full") == 1


async def test_a_model_that_nobody_knows_is_not_waited_for() -> None:
    async with house() as it:
        with pytest.raises(ModelNotFound):
            await it.room.wait("gpt-17")
        assert it.room.known("gpt-17") is None


async def test_the_demand_of_a_frontend_that_died_goes_with_its_lease() -> None:
    async with house() as it:
        await it.cluster.drain(0)
        await it.unready()
        waiting = asyncio.create_task(it.room.wait("echo"))
        await it.demand({"echo": 1})
        await it.room._runtime.crash()
        await it.demand({})
        await ended(waiting)
