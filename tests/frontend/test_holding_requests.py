"""Requests that wait for a worker, over HTTP, with real workers in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import attrs
import httpx
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Frontend, Hold
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.pipeline.holding import HoldingRoom
from dynamo_core.runtime.demand import ColdModel, ColdModels
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster


@attrs.define
class Place:
    cluster: Cluster
    client: httpx.AsyncClient
    registry: CollectorRegistry

    async def ask(self, **fields: object) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "echo", "prompt": "hello", "max_tokens": 5} | fields)

    def held(self) -> float:
        return self.registry.get_sample_value("dynamo_frontend_held_requests", {"model": "echo"}) or 0.0

    async def until_held(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.held() != count:
                await asyncio.sleep(0.01)

    def fail(self, seconds: float, *, busy: bool = False) -> None:
        """What the frontend does with its only worker when a request to it has failed, or was turned away."""
        router = next(iter(self.cluster.catalog.offered().values())).dispatcher("aggregated").router
        router.inhibit(router.workers[0], seconds, "it failed", busy=busy)

    async def empty(self) -> None:
        await self.cluster.drain(0)
        async with asyncio.timeout(10):
            while self.cluster.catalog.models():
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def place(workers: int = 1, **hold: float) -> AsyncGenerator[Place]:
    registry = CollectorRegistry()
    async with Cluster.up(workers=workers) as cluster, Runtime.open(cluster.config, cluster.plugins) as runtime:
        async with HoldingRoom.open(runtime, cluster.catalog, Hold(**hold), registry) as room:  # type: ignore[arg-type]
            app = create_app(Frontend(), cluster.catalog, metrics=HttpMetrics(registry), holding=room)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30) as client:
                yield Place(cluster, client, registry)


async def test_a_request_that_waited_is_answered_as_if_it_had_not() -> None:
    async with place() as it:
        direct = (await it.ask()).json()["choices"]
        await it.empty()
        waiting = asyncio.create_task(it.ask())
        await it.until_held(1)
        await it.cluster.add()
        answer = await waiting
        assert answer.status_code == 200
        assert answer.json()["choices"] == direct
        assert it.registry.get_sample_value("dynamo_frontend_inflight_requests", {"model": "echo"}) == 0


async def test_a_request_that_nobody_comes_for_is_answered_503_and_told_when_to_ask_again() -> None:
    async with place(max_wait=0.1, retry_after=30.0) as it:
        await it.empty()
        answer = await it.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
        assert answer.json()["error"]["type"] == "service_unavailable"
        assert "none came within 0.1 s" in answer.json()["error"]["message"]
        assert it.held() == 0


async def test_one_request_too_many_is_answered_529() -> None:
    async with place(limit=1) as it:
        await it.empty()
        waiting = asyncio.create_task(it.ask())
        await it.until_held(1)
        assert (await it.ask()).status_code == 529
        await it.cluster.add()
        assert (await waiting).status_code == 200


async def test_what_the_model_does_not_offer_is_refused_after_the_wait() -> None:
    async with place() as it:
        await it.empty()
        waiting = asyncio.create_task(it.client.post("/v1/embeddings", json={"model": "echo", "input": "hello"}))
        await it.until_held(1)
        await it.cluster.add()
        assert (await waiting).status_code == 400


async def test_a_frontend_is_ready_for_the_first_request_of_a_cold_model_and_for_no_other() -> None:
    async with place(workers=0) as it:
        assert (await it.client.get("/ready")).status_code == 503
        assert (await it.ask()).status_code == 503
        async with MemoryDiscovery(it.cluster.config.discovery.options["name"]) as store:
            cold = ColdModels(store, "dynamo")
            await cold.offer([ColdModel(name="echo")])
            async with asyncio.timeout(10):
                while (await it.client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.01)
            assert [(m["id"], m["status"]) for m in (await it.client.get("/v1/models")).json()["data"]] == [("echo", "cold")]
            assert (await it.client.get("/v1/models/echo")).json()["status"] == "cold"
            assert (await it.ask(model="gpt-17")).status_code == 503
            waiting = asyncio.create_task(it.ask())
            await it.until_held(1)
            await it.cluster.add()
            assert (await waiting).status_code == 200
            assert "status" not in (await it.client.get("/v1/models/echo")).json()
            await cold.close()


async def test_a_request_that_comes_just_after_the_only_worker_failed_waits_for_the_next_one() -> None:
    async with place() as it:
        it.fail(30.0)
        waiting = asyncio.create_task(it.ask())
        await it.until_held(1)
        await it.cluster.add()
        assert (await waiting).status_code == 200


async def test_a_request_that_waits_for_a_worker_that_failed_goes_on_when_it_is_forgiven() -> None:
    async with place() as it:
        it.fail(1.0)
        assert (await it.ask()).status_code == 200
        assert it.registry.get_sample_value("dynamo_frontend_held_total", {"model": "echo", "outcome": "served"}) == 1


async def test_nobody_waits_for_workers_that_are_merely_full() -> None:
    async with place() as it:
        it.fail(30.0, busy=True)
        assert (await it.ask()).status_code == 529
        assert it.held() == 0


async def test_who_waits_in_vain_for_a_worker_that_failed_is_told_so() -> None:
    async with place(max_wait=0.3, retry_after=9.0) as it:
        it.fail(30.0)
        answer = await it.ask()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "9")
        assert "failed a moment ago" in answer.json()["error"]["message"]
