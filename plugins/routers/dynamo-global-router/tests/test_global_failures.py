"""Pools that fail, and the ends of requests, behind a global router."""

from __future__ import annotations

import asyncio

import pytest
from global_site import FAST, LOOSE, PROMPT, SLOW, TIGHT, alone, bare, sim, site, until

from dynamo_core.errors import AllBusy, DynamoError, NoWorker, Unavailable
from dynamo_core.testing.cluster import read_all
from dynamo_core.types import Hints

# ---------------------------------------------------------------------- pools that fail


async def test_a_pool_that_is_gone_is_avoided_said_so_and_used_again_when_it_is_back() -> None:
    async with site() as up:
        router = up.routers[0]
        await up.kill("slow")
        for _ in range(3):
            tokens, generation = await up.ask(LOOSE)
            assert len(tokens) == 10
            assert (await up.story(generation))[0]["served"] == "fast"
        choice = (await up.story(generation))[0]
        assert "x slow: gone: " in choice["text"]
        assert router.problems()["pool slow"].startswith("gone: ")
        assert b'dynamo_global_router_pool_state{pool="slow",state="gone"} 1.0' in router.metrics()
        await up.worker("slow")
        await until(lambda: "pool slow" not in router.problems())
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "slow"


@pytest.mark.slow
async def test_a_request_without_output_moves_to_another_pool() -> None:
    async with site(slow_engine=sim(pace_ms=400.0)) as up:
        asking = asyncio.create_task(up.ask(LOOSE))
        await until(lambda: up.serving() == ["slow"])
        await up.kill("slow")
        tokens, generation = await asking
        assert tokens == await alone()
        choice = (await up.story(generation))[0]
        assert (choice["chosen"], choice["served"]) == ("slow", "fast")
        assert next(row for row in choice["rows"] if row["name"] == "slow")["tried"].startswith("unavailable: ")
        assert up.routers[0].metrics().count(b'dynamo_global_router_failures_total{code="unavailable",pool="slow"} 1.0') == 1


@pytest.mark.slow
async def test_after_the_first_output_a_request_stays_in_its_pool() -> None:
    async with site(slow_engine=sim(pace_ms=30.0)) as up:
        generation = await up.cluster.generate(PROMPT, max_tokens=200, hints=LOOSE)
        await generation.read()
        await up.kill("slow")
        with pytest.raises(Unavailable, match="the worker was lost"):
            await read_all(generation)


async def test_inside_a_pool_a_stream_moves_to_another_worker_and_goes_on() -> None:
    expected = await alone(60)
    async with site(fast=1, slow=2) as up:
        generation = await up.cluster.generate(PROMPT, max_tokens=60, hints=LOOSE)
        tokens = [token for delta in await generation.read() for token in delta.token_ids]
        victim = next(n for n in up.of["slow"] if up.cluster.worker(n).admission.in_flight)
        up.of["slow"].remove(victim)
        await up.cluster.kill(victim)
        tokens += (await read_all(generation))[1]
        assert tokens == expected
        assert generation.usage.completion_tokens == 60
        choice, *inner = await up.story(generation)
        assert choice["served"] == "slow"
        assert [decision["outcome"] for decision in inner] == ["failed", "done"]


async def test_when_all_pools_are_full_the_client_is_told_to_come_back() -> None:
    async with bare() as up:
        for pool in ("fast", "slow"):
            await up.worker(pool, sim(pace_ms=50.0), max_requests=1)
        await up.router(FAST, SLOW)
        await up.ready()
        generations = [await up.cluster.generate([i, *PROMPT], max_tokens=500, hints=LOOSE) for i in range(2)]
        for generation in generations:
            await generation.read()
        assert sorted([(await up.story(g))[0]["served"] for g in generations]) == ["fast", "slow"]
        with pytest.raises(AllBusy) as refusal:
            await up.ask(LOOSE)
        assert refusal.value.status == 529
        assert "pool slow" in str(refusal.value)
        for generation in generations:
            generation.cancel()
        await until(lambda: not up.serving())


@pytest.mark.slow
async def test_without_any_pool_the_model_is_not_served_until_one_is_back() -> None:
    async with site() as up:
        await up.kill("fast")
        await up.kill("slow")
        with pytest.raises(DynamoError) as refusal:
            await up.ask(LOOSE)
        assert isinstance(refusal.value, Unavailable)
        await until(lambda: up.cluster.catalog.not_ready() is not None)
        await up.worker("fast")
        await until(lambda: up.cluster.catalog.not_ready() is None)
        assert len((await up.ask(LOOSE))[0]) == 10


async def test_a_pool_that_fails_request_after_request_is_degraded_and_only_a_last_resort() -> None:
    async with site() as up:
        router = up.routers[0]
        slow = router._pools[1]
        for _ in range(3):
            slow.failed(NoWorker("the request", ["a reason"]))
        assert slow.look().row.state == "degraded"
        assert "3 requests in a row failed there" in router.problems()["pool slow"]
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "fast"
        await up.kill("fast")
        await until(lambda: router._pools[0].look().row.state == "gone")
        for _ in range(3):
            slow.failed(NoWorker("the request", ["a reason"]))
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "slow"
        assert slow.look().row.state == "ready", "it has served"


async def test_a_pool_with_few_workers_in_order_is_degraded() -> None:
    async with site(slow=3) as up:
        slow = up.routers[0]._pools[1]
        dispatcher = slow.model().dispatcher("aggregated")
        for worker in list(dispatcher.router.workers)[:2]:
            dispatcher.router.inhibit(worker, 60.0, "it broke a stream")
        assert slow.look().row.why == "only 1 of 3 workers are in order"
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "fast"


# ---------------------------------------------------------------------- the ends of requests


async def test_a_cancelled_request_stops_in_its_pool() -> None:
    async with site() as up:
        for reads in (0, 1):
            generation = await up.cluster.generate(PROMPT, max_tokens=5000, hints=LOOSE)
            await until(lambda: up.serving() == ["slow"])
            for _ in range(reads):
                await generation.read()
            generation.cancel()
            await until(lambda: not up.serving())
        assert not up.routers[0]._active


async def test_a_stop_string_ends_the_work_in_the_pool() -> None:
    async with site() as up:
        generation = await up.cluster.generate(PROMPT, max_tokens=5000, hints=LOOSE, stop=[" "])
        assert (await read_all(generation))[2] == "stop"
        await until(lambda: not up.serving())


async def test_requests_of_one_id_do_not_disturb_each_other() -> None:
    from dynamo_core.context import Context

    async with site() as up:
        answers = await asyncio.gather(*(up.ask(LOOSE, prompt=[i, *PROMPT], context=Context("same")) for i in range(5)))
        assert len({tuple(tokens) for tokens, _ in answers}) == 5
        assert not up.routers[0]._active


async def test_a_pin_to_the_global_router_means_nothing_to_its_pools() -> None:
    async with site() as up:
        id = up.cluster.catalog.status()["models"]["sim"]["workers"][0]["id"]
        tokens, _ = await up.ask(Hints(instance=int(id, 16), dp_rank=0))
        assert len(tokens) == 10


@pytest.mark.slow
async def test_a_crowd_that_comes_and_goes_while_workers_die_leaves_nothing_behind() -> None:
    async with site(fast=2, slow=2) as up:
        async def one(i: int) -> str:
            asking = asyncio.create_task(up.cluster.generate([i, *PROMPT], max_tokens=30 + i % 50, hints=TIGHT if i % 2 else LOOSE))
            if i % 5 == 0:
                await asyncio.sleep(0.002 * (i % 7))
                asking.cancel()
            generation = (await asyncio.gather(asking, return_exceptions=True))[0]
            if isinstance(generation, BaseException):
                return "left" if isinstance(generation, asyncio.CancelledError) else str(generation)
            if i % 5 == 1:
                await generation.read()
                generation.cancel()
                return "left"
            return "done" if len((await read_all(generation))[1]) == 30 + i % 50 else "short"

        async def crowd() -> list[str]:
            asked = [asyncio.create_task(one(i)) for i in range(300)]
            for pool in ("slow", "fast"):
                await asyncio.sleep(0.2)
                await up.cluster.kill(up.of[pool].pop())
            return await asyncio.gather(*asked)

        outcomes = await crowd()
        assert {*outcomes} == {"done", "left"}, {outcome for outcome in outcomes if outcome not in ("done", "left")}
        assert outcomes.count("done") >= 180
        await until(lambda: not up.serving())
        router = up.routers[0]
        assert not router._active
        for pool in router._pools:
            assert pool.look().row.facts.sequences == 0, "a booking was left open"  # type: ignore[union-attr]
            dispatcher = pool.model().dispatcher("aggregated")  # type: ignore[union-attr]
            assert dispatcher.router.open_here() == []
