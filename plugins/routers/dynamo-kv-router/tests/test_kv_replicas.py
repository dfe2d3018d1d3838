"""Two frontends before one fleet: what one sends, the other knows as if it had sent it itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Router, Use
from dynamo_core.context import Context
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.router import Router as LiveRouter
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Request, Stops, TextOptions
from dynamo_kv_router.affinity import SESSION_HERE
from dynamo_kv_router.load_facts import ACTIVE_BLOCKS, ACTIVE_OVERLAP_TOKENS

ENGINE = {"delay": 0.4}
PROMPT = list(range(65, 65 + 160))
"""Ten blocks."""


@contextlib.asynccontextmanager
async def frontend(cluster: Cluster) -> AsyncGenerator[FleetCatalog]:
    """Another one."""
    async with Runtime.open(cluster.config, cluster.plugins) as runtime, FleetCatalog.open(runtime, CollectorRegistry()) as catalog:
        workers = sum(member is not None for member in cluster.members)
        await until(lambda: sum(w["proven"] for m in catalog.status()["models"].values() for w in m["workers"]) == workers)
        yield catalog


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


def router(catalog: FleetCatalog) -> LiveRouter:
    return catalog.models()[0].dispatchers["aggregated"].router  # pyright: ignore[reportAttributeAccessIssue]


def column(catalog: FleetCatalog, fact, **about) -> dict[Worker, int]:
    weighed = router(catalog).weigh(RoutingRequest("asked", "m", **about))
    return {worker: int(value) for worker, value in zip(weighed.workers, weighed.columns[fact], strict=True)}


def total(catalog: FleetCatalog, fact) -> int:
    return sum(column(catalog, fact, token_ids=PROMPT, prompt_tokens=len(PROMPT)).values())


async def send(catalog: FleetCatalog, id: str, prompt: list[int], tokens: int = 50, session: str | None = None):
    model = catalog.models()[0]
    request = Request(id=id, model=model.name, token_ids=prompt, stops=Stops(max_tokens=tokens), hints=Hints(session=session))
    return await model.start(request, TextOptions(), Context(id))


@pytest.fixture(params=["in-process", "zmq"])
def event_plane(request: pytest.FixtureRequest) -> Use | None:
    return None if request.param == "in-process" else Use("zmq")


async def test_requests_of_another_frontend_share_blocks_with_ours(event_plane: Use | None) -> None:
    stack = Router(scorers=(Use("kv-cost"),))
    async with Cluster.up(workers=1, engine="echo", options=ENGINE, router=stack, event_plane=event_plane) as cluster, frontend(cluster) as other:
        mine = await send(cluster.catalog, "mine", PROMPT)
        await until(lambda: total(other, ACTIVE_OVERLAP_TOKENS) == 160)
        theirs = await send(other, "theirs", PROMPT[:80] + list(range(100, 180)))
        for catalog in (cluster.catalog, other):
            await until(lambda c=catalog: total(c, ACTIVE_BLOCKS) == 15)  # 10 and 10, of which 5 are the same
        mine.cancel()
        for catalog in (cluster.catalog, other):
            await until(lambda c=catalog: total(c, ACTIVE_BLOCKS) == 10)
        theirs.cancel()
        await until(lambda: total(cluster.catalog, ACTIVE_BLOCKS) == 0)
        assert not cluster.catalog.problems()
        assert not router(other).faults


async def test_without_events_what_another_frontend_sent_is_taken_to_be_cached(event_plane: Use | None) -> None:
    stack = Router(scorers=(Use("kv-overlap"),))
    asked = {"token_ids": [*PROMPT, 1], "prompt_tokens": 161}
    async with Cluster.up(workers=3, engine="echo", router=stack, event_plane=event_plane) as cluster:
        # Both name blocks by the secret of the namespace, from shortly after their start.
        await until(lambda: len(router(cluster.catalog).named(RoutingRequest("r", "m", **asked))) > 0)
        async with frontend(cluster) as other:
            await read_all(await send(other, "r", [*PROMPT, 1]))
            await until(lambda: total(cluster.catalog, OVERLAP_TOKENS) > 0)
            assert sorted(column(other, OVERLAP_TOKENS, **asked).values()) == [0, 0, 160]
            assert column(other, OVERLAP_TOKENS, **asked) == column(cluster.catalog, OVERLAP_TOKENS, **asked)
        async with frontend(cluster) as newcomer:
            await until(lambda: column(newcomer, OVERLAP_TOKENS, **asked) == column(cluster.catalog, OVERLAP_TOKENS, **asked))
            assert not router(newcomer).faults


async def test_a_session_keeps_its_worker_when_it_comes_through_another_frontend(event_plane: Use | None) -> None:
    stack = Router(filters=(Use("session"),), scorers=(Use("load"),))
    async with Cluster.up(workers=4, engine="echo", router=stack, event_plane=event_plane) as cluster, frontend(cluster) as other:
        homes: dict[str, str] = {}
        for i in range(6):
            generation = await send((cluster.catalog, other)[i % 2], f"r{i}", PROMPT[:40], 2, session=f"s{i}")
            await read_all(generation)
            homes[f"s{i}"] = generation.workers[0]
        for catalog in (cluster.catalog, other):
            await until(lambda c=catalog: all(any(column(c, SESSION_HERE, hints=Hints(session=s)).values()) for s in homes))
        for i, session in enumerate(homes):
            generation = await send((other, cluster.catalog)[i % 2], f"again{i}", PROMPT[:40], 2, session=session)
            await read_all(generation)
            assert generation.workers == [homes[session]]


async def test_a_new_frontend_learns_the_sessions_of_before(event_plane: Use | None) -> None:
    stack = Router(filters=(Use("session"),), scorers=(Use("turn"),))
    async with Cluster.up(workers=4, engine="echo", router=stack, event_plane=event_plane) as cluster:
        homes: dict[str, str] = {}
        for i in range(8):
            generation = await send(cluster.catalog, f"r{i}", PROMPT[:40], 2, session=f"s{i}")
            await read_all(generation)
            homes[f"s{i}"] = generation.workers[0]
        assert len(set(homes.values())) == 4
        async with frontend(cluster) as other:
            await until(lambda: any(column(other, SESSION_HERE, hints=Hints(session="s7")).values()))
            for session, home in homes.items():
                generation = await send(other, f"later {session}", PROMPT[:40], 2, session=session)
                await read_all(generation)
                assert generation.workers == [home]
            assert not router(other).faults


async def test_a_new_frontend_learns_what_is_under_way(event_plane: Use | None) -> None:
    stack = Router(scorers=(Use("kv-cost"),))
    async with Cluster.up(workers=1, engine="echo", options=ENGINE, router=stack, event_plane=event_plane) as cluster:
        mine = await send(cluster.catalog, "mine", PROMPT)
        async with frontend(cluster) as other:
            await until(lambda: total(other, ACTIVE_OVERLAP_TOKENS) == 160)
        mine.cancel()
