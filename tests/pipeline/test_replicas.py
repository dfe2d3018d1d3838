"""Two frontends before one fleet count each other's requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Router, Use
from dynamo_core.context import Context
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS, IN_FLIGHT
from dynamo_core.routing.router import Router as LiveRouter
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Request, Stops, TextOptions


@contextlib.asynccontextmanager
async def second_frontend(cluster: Cluster) -> AsyncGenerator[FleetCatalog]:
    async with Runtime.open(cluster.config, cluster.plugins) as runtime, FleetCatalog.open(runtime, CollectorRegistry()) as catalog:
        workers = sum(member is not None for member in cluster.members)
        await until(lambda: sum(w["proven"] for m in catalog.status()["models"].values() for w in m["workers"]) == workers)
        yield catalog


async def until(condition) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


def router_of(catalog: FleetCatalog) -> LiveRouter:
    return catalog.models()[0].dispatchers["aggregated"].router


def seen(catalog: FleetCatalog, fact=IN_FLIGHT) -> int:
    return sum(worker["facts"][fact.name] for worker in router_of(catalog).status())


async def start(catalog: FleetCatalog, id: str, tokens: int = 20, tokens_out: int = 100):
    request = Request(id=id, model=catalog.models()[0].name, token_ids=list(range(65, 65 + tokens)), stops=Stops(max_tokens=tokens_out))
    return await catalog.models()[0].start(request, TextOptions(), Context(id))


@pytest.mark.parametrize("plane", ["in-process", "zmq"])
async def test_what_one_frontend_sends_the_other_counts_until_it_ends(plane, tmp_path):
    event_plane = None if plane == "in-process" else Use("zmq")
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.05}, router=Router(use=Use("least-loaded")), event_plane=event_plane) as cluster:
        async with second_frontend(cluster) as other:
            running = [await start(cluster.catalog, f"same-id-{i}", tokens_out=20) for i in range(4)]
            await until(lambda: seen(other) == 4)
            theirs = await start(other, "same-id-0", tokens_out=20)  # ids of two frontends may agree
            await until(lambda: seen(cluster.catalog) == 5)
            for generation in running:
                await read_all(generation)
            await read_all(theirs)
            await until(lambda: seen(other) == seen(cluster.catalog) == 0)
            assert seen(other, BOOKED_PREFILL_TOKENS) == seen(cluster.catalog, BOOKED_PREFILL_TOKENS) == 0


async def test_a_new_frontend_learns_what_is_under_way_and_what_a_lost_one_sent_is_forgotten():
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.4}, router=Router(use=Use("least-loaded"))) as cluster:
        running = [await start(cluster.catalog, f"r{i}") for i in range(3)]
        async with second_frontend(cluster) as other:
            await until(lambda: seen(other) == 3)
            mine = await start(other, "mine")
            await until(lambda: seen(cluster.catalog) == 4)
            mine.cancel()
            await until(lambda: seen(cluster.catalog) == 3)
            lost = [await start(other, f"lost{i}") for i in range(2)]
            await until(lambda: seen(cluster.catalog) == 5)
        await until(lambda: seen(cluster.catalog) == 3)
        for generation in (*running, *lost):
            generation.cancel()
        await until(lambda: seen(cluster.catalog) == 0)


async def test_two_frontends_that_send_at_once_share_the_workers_evenly():
    async with Cluster.up(workers=4, engine="echo", options={"delay": 0.4}, router=Router(use=Use("least-loaded"))) as cluster:
        async with second_frontend(cluster) as other:
            sent = []
            for i in range(8):
                sent.append(await start((cluster.catalog, other)[i % 2], f"r{i}"))
                await until(lambda n=i + 1: seen(cluster.catalog) == seen(other) == n)
            loads = [worker["facts"][IN_FLIGHT.name] for worker in router_of(other).status()]
            assert loads == [2, 2, 2, 2]
            for generation in sent:
                generation.cancel()
