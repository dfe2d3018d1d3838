"""A global router between a frontend's pipeline and pools of simulated workers: real planes, real pipelines, one process."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.config import build
from dynamo_core.config.schema import Migration, Use
from dynamo_core.errors import AllBusy, ConfigError, DynamoError, NoWorker, PromptTooLong, Unavailable
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Request
from dynamo_global_router.engine import GlobalRouter

PROMPT = list(range(300, 520))
TIGHT = Hints(ttft_target_ms=100.0, itl_target_ms=10.0)
LOOSE = Hints(ttft_target_ms=5000.0, itl_target_ms=500.0)
FAST = {"name": "fast", "cost": 4.0, "rates": {"prefill_ms": 10.0, "itl_ms": 2.0, "learn": False}}
SLOW = {"name": "slow", "cost": 1.0, "rates": {"prefill_ms": 300.0, "itl_ms": 50.0, "learn": False}}


def sim(**options: Any) -> Use:
    return Use("sim", {"pace_ms": 1.0, "block_size": 16, **options})


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := condition()):
            await asyncio.sleep(0.01)
        return found


class Site:
    """A cluster whose frontend sees a global router, and pools behind it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.of: dict[str, list[int]] = {}
        """Numbers of the workers of each pool."""
        self.routers: list[GlobalRouter] = []

    async def worker(self, pool: str, engine: Use | None = None, **settings: Any) -> int:
        number = await self.cluster.add(engine=engine or sim(), namespace=pool, name="backend", **settings)
        self.of.setdefault(pool, []).append(number)
        return number

    async def router(self, *pools: Mapping[str, Any], name: str = "global", **options: Any) -> GlobalRouter:
        number = await self.cluster.add(engine=Use("global-router", {"pools": list(pools), **options}), name=name)
        router: Any = self.cluster.worker(number).engine
        self.routers.append(router)
        return router

    async def ready(self) -> None:
        await self.cluster.wait_ready(len(self.routers))
        for router in self.routers:
            await until(lambda router=router: all(pool.look().row.state == "ready" for pool in router._pools))
            for pool in router._pools:
                await until(lambda pool=pool: all(member.proven for member in pool.model().members.values()) and len(pool.model().members) == len(
                    [n for n in self.of[pool.name.name] if self.cluster.members[n]]))

    async def kill(self, pool: str) -> None:
        for number in self.of.pop(pool):
            await self.cluster.kill(number)

    async def ask(self, hints: Hints = LOOSE, tokens: int = 10, prompt: Sequence[int] = PROMPT, **other: Any) -> tuple[list[int], Any]:
        generation = await self.cluster.generate(prompt, max_tokens=tokens, hints=hints, **other)
        return (await read_all(generation))[1], generation

    async def story(self, generation: Any) -> list[dict[str, Any]]:
        """What the global router says of the request, as the frontend gets it."""
        return await self.cluster.catalog.further(generation.decisions[-1])

    def serving(self) -> list[str]:
        """Pools that have a request in progress."""
        return [pool for pool, numbers in self.of.items() if any(self.cluster.worker(n).admission.in_flight for n in numbers)]


@contextlib.asynccontextmanager
async def site(fast: int = 1, slow: int = 1, **options: Any) -> AsyncIterator[Site]:
    async with bare() as found:
        for pool, count in (("fast", fast), ("slow", slow)):
            for _ in range(count):
                await found.worker(pool)
        await found.router(FAST, SLOW, **options)
        await found.ready()
        yield found


@contextlib.asynccontextmanager
async def bare(**cluster: Any) -> AsyncIterator[Site]:
    options: dict[str, Any] = {"migration": Migration(wait=1.0, inhibit=0.5), **cluster}
    async with Cluster.up(workers=0, engine=sim(), **options) as up:
        yield Site(up)


async def alone(tokens: int = 10) -> list[int]:
    """What one worker says to the prompt."""
    async with Cluster.up(workers=1, engine=sim()) as cluster:
        return (await read_all(await cluster.generate(PROMPT, max_tokens=tokens)))[1]


# ---------------------------------------------------------------------- choosing


async def test_each_request_goes_to_the_cheapest_pool_that_meets_its_targets_and_says_why() -> None:
    expected = await alone()
    async with site() as up:
        for hints, pool in ((LOOSE, "slow"), (TIGHT, "fast"), (Hints(), "slow")):
            tokens, generation = await up.ask(hints)
            assert tokens == expected
            assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(PROMPT), 10)
            choice, inner = await up.story(generation)
            assert (choice["chosen"], choice["served"]) == (pool, pool)
            assert choice["request"]["id"] == inner["request"]["id"]
            assert f"served by  {pool}" in choice["text"]
            assert {row["name"] for row in choice["rows"]} == {"fast", "slow"}
            assert inner["outcome"] == "done"
            assert inner["labels"] == [up.cluster.worker(up.of[pool][0]).runtime.instance("backend", "generate").label]


async def test_defaults_stand_in_for_targets_that_nobody_named() -> None:
    async with site(ttft_target_ms=100.0, itl_target_ms=10.0) as up:
        _, generation = await up.ask(Hints())
        (choice, _) = await up.story(generation)
        assert choice["served"] == "fast"
        assert "targets    TTFT 100 ms (default)  ITL 10 ms (default)" in choice["text"]
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "slow"


async def test_a_grid_and_its_overrides_choose_as_written() -> None:
    table = {"use": "grid", "table": [["fast"], ["slow"]], "ttft_ms": {"min": 0, "max": 200, "steps": 2}, "itl_ms": {"min": 0, "max": 1, "steps": 1},
             "overrides": [{"min_priority": 10, "pool": "fast"}]}
    async with site(strategy=table) as up:
        for hints, pool, kind in ((LOOSE, "slow", "grid"), (TIGHT, "slow", "grid"), (Hints(ttft_target_ms=50.0), "fast", "grid"), (Hints(priority=10), "fast", "override")):
            _, generation = await up.ask(hints)
            choice = (await up.story(generation))[0]
            assert (choice["served"], choice["kind"]) == (pool, kind)


async def test_a_configuration_of_dynamo_serves_as_it_is(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text("""{"mode": "agg", "num_agg_pools": 2, "agg_pool_dynamo_namespaces": ["fast", "slow"], "agg_pool_selection_strategy": {
        "ttft_min_ms": 0, "ttft_max_ms": 200, "ttft_resolution": 2, "itl_min_ms": 0, "itl_max_ms": 1, "itl_resolution": 1, "agg_pool_mapping": [[0], [1]]}}""")
    async with bare() as up:
        await up.worker("fast")
        await up.worker("slow")
        await up.router(dynamo_json=str(path), pools=[])
        await up.ready()
        for target, pool in ((50.0, "fast"), (150.0, "slow")):
            _, generation = await up.ask(Hints(ttft_target_ms=target))
            assert (await up.story(generation))[0]["served"] == pool


async def test_the_pools_router_counts_cached_prompts_and_load_into_the_estimate() -> None:
    slow = {**SLOW, "router": {"use": "kv"}, "rates": {"prefill_ms": 1.0, "prefill_ms_per_1000": 2000.0, "itl_ms": 1.0, "learn": False}}
    async with bare() as up:
        await up.worker("fast")
        await up.worker("slow")
        router = await up.router(FAST, slow)
        await up.ready()
        target = Hints(ttft_target_ms=150.0)
        _, first = await up.ask(target)
        _, warming = await up.ask(LOOSE)
        assert [(await up.story(g))[0]["served"] for g in (first, warming)] == ["fast", "slow"]
        same = Request(id="same", model="sim", token_ids=PROMPT)
        await until(lambda: router._pools[1].look(same).row.facts.uncached_tokens < 20)  # news of the cache take a moment
        _, second = await up.ask(target)
        choice = (await up.story(second))[0]
        assert choice["served"] == "slow", choice["text"]
        assert next(row for row in choice["rows"] if row["name"] == "slow")["facts"]["uncached_tokens"] < 20
        assert second.usage.cached_tokens > 200


@pytest.mark.slow
async def test_the_speed_of_pools_is_learned() -> None:
    async with bare() as up:
        await up.worker("fast", sim(pace_ms=1.0))
        await up.worker("slow", sim(pace_ms=40.0))
        router = await up.router({"name": "fast", "cost": 4.0}, {"name": "slow", "cost": 1.0})
        await up.ready()
        for _ in range(4):
            await up.ask(Hints())
        assert router._pools[1].speed.itl.at(0) > 20, "a step takes 40 ms there"
        _, generation = await up.ask(Hints(itl_target_ms=15.0))
        choice = (await up.story(generation))[0]
        assert choice["served"] == "fast", choice["text"]


async def test_a_burst_fills_the_cheap_pool_as_far_as_its_targets_go_and_spills_over() -> None:
    cheap = {**SLOW, "rates": {"prefill_ms": 10.0, "prefill_ms_per_1000": 0.0, "itl_ms": 10.0, "learn": False}}
    async with bare() as up:
        await up.worker("fast", sim(pace_ms=5.0))
        await up.worker("slow", sim(pace_ms=5.0, max_sequences=3))
        await up.router(FAST, cheap)
        await up.ready()
        generations = [await up.cluster.generate([i, *PROMPT], max_tokens=300, hints=Hints(ttft_target_ms=200.0)) for i in range(8)]
        answers = await asyncio.gather(*(read_all(generation) for generation in generations))
        served = [(await up.story(generation))[0]["served"] for generation in generations]
        assert served == ["slow"] * 3 + ["fast"] * 5, "a fourth one would wait for a place longer than its target"
        assert all(len(tokens) == 300 for _, tokens, _ in answers)


async def test_every_series_is_on_the_page_and_every_series_of_the_page_is_exported() -> None:
    page = (Path(__file__).parents[4] / "docs" / "reference" / "metrics.md").read_text()
    async with site() as up:
        await up.ask(TIGHT)
        families = text_string_to_metric_families(up.routers[0].metrics().decode())
        exported = {family.name + ("_total" if family.type == "counter" else "") for family in families if not family.name.endswith("_created")}
        assert {name for name in exported if name.startswith("dynamo_global_router_")} == set(re.findall(r"^\| `(dynamo_global_router_\w+)`", page, re.M))
        assert {name for name in exported if not name.startswith("dynamo_global_router_")} <= set(re.findall(r"^\| `(\w+)`", page, re.M))


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
    async with bare() as up:
        await up.worker("fast")
        await up.worker("slow", sim(pace_ms=400.0))
        await up.router(FAST, SLOW)
        await up.ready()
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
    async with bare() as up:
        await up.worker("fast")
        await up.worker("slow", sim(pace_ms=30.0))
        await up.router(FAST, SLOW)
        await up.ready()
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


# ---------------------------------------------------------------------- pools that differ


async def test_a_pool_may_have_a_store_of_its_own() -> None:
    async with bare() as up, Cluster.up(workers=1, engine=sim()) as elsewhere:
        await up.worker("fast")
        await up.router(FAST, {**SLOW, "namespace": elsewhere.config.namespace, "discovery": {"use": "memory", **elsewhere.config.discovery.options}})
        await up.cluster.wait_ready(1)
        tokens, generation = await up.ask(LOOSE)
        assert len(tokens) == 10
        assert (await up.story(generation))[0]["served"] == "slow"


async def test_a_pool_whose_store_cannot_be_reached_is_gone_and_harms_nobody() -> None:
    async with bare() as up:
        await up.worker("fast")
        router = await up.router(FAST, {**SLOW, "discovery": {"use": "file", "path": "/proc/nowhere"}}, startup=0.0)
        await up.cluster.wait_ready(1)
        await until(lambda: router.problems().get("pool slow", "").startswith("gone: its fleet cannot be followed: "))
        assert len((await up.ask(LOOSE))[0]) == 10


async def test_requests_wait_in_the_queue_of_a_pool_that_has_one() -> None:
    async with bare() as up:
        await up.worker("fast", max_requests=1)
        await up.worker("slow", sim(max_sequences=1, pace_ms=5.0))
        queue = {"filters": [{"use": "not-full", "limit": 1.0}], "scorers": [{"use": "load"}], "queue": {"prefill_tokens": 1_000_000, "limit": 2}}
        router = await up.router(FAST, {**SLOW, "router": queue})
        await up.ready()
        asked = [asyncio.create_task(up.ask(Hints(), tokens=200, prompt=[i, *PROMPT])) for i in range(3)]
        await until(lambda: router._pools[1].look().row.state == "full")
        assert router._pools[1].look().row.why == "2 requests wait in its router's queue"
        _, generation = await up.ask(Hints())
        assert (await up.story(generation))[0]["served"] == "fast"
        assert [(await up.story(generation))[0]["served"] for _, generation in await asyncio.gather(*asked)] == ["slow"] * 3


async def test_a_long_prompt_goes_to_the_pool_that_has_room_for_it() -> None:
    async with bare() as up:
        await up.worker("fast", sim(context_length=4096))
        await up.worker("slow", sim(context_length=256))
        await up.router(FAST, SLOW)
        await up.ready()
        assert up.cluster.model.card.context_length == 4096
        _, short = await up.ask(LOOSE, prompt=PROMPT[:100])
        _, long = await up.ask(LOOSE, prompt=PROMPT * 4)
        assert [(await up.story(g))[0]["served"] for g in (short, long)] == ["slow", "fast"]
        assert "x slow: unfit: the prompt has 880 tokens" in (await up.story(long))[0]["text"]
        with pytest.raises(PromptTooLong):
            await up.ask(LOOSE, prompt=PROMPT * 20)


@pytest.mark.slow
async def test_a_pool_of_another_tokenizer_is_refused_by_name() -> None:
    async with bare() as up:
        await up.worker("fast")
        await up.worker("slow", Use("echo", {"model": "sim"}))
        router = await up.router(FAST, SLOW)
        await up.cluster.wait_ready(1)
        await until(lambda: "another tokenizer" in router.problems().get("pool slow", ""))
        _, generation = await up.ask(LOOSE)
        assert (await up.story(generation))[0]["served"] == "fast"


async def test_no_weights_and_no_cache_are_claimed() -> None:
    async with site() as up:
        card = up.cluster.model.card
        assert card.name == "sim"
        assert card.engine.startswith("global-router")
        assert (card.kv_events, card.total_blocks, card.max_sequences) == (False, None, None)
        assert card.tokenizer == up.routers[0]._pools[0].card().tokenizer  # type: ignore[union-attr]


# ---------------------------------------------------------------------- roles


async def test_prefill_and_decode_of_one_model_each_have_pools_of_their_own() -> None:
    expected = await alone(20)
    async with bare() as up:
        for pool, role in (("read-1", "prefill"), ("read-2", "prefill"), ("write-1", "decode"), ("write-2", "decode")):
            await up.worker(pool, sim(role=role))
        readers = [{**FAST, "name": "read-1"}, {**SLOW, "name": "read-2"}]
        writers = [{**FAST, "name": "write-1"}, {**SLOW, "name": "write-2"}]
        grid = {"use": "grid", "table": [["read-1", "read-2"]], "input": {"min": 0, "max": 1000, "steps": 1}, "ttft_ms": {"min": 0, "max": 200, "steps": 2}}
        await up.router(*readers, name="global-prefill", role="prefill", strategy=grid)
        await up.router(*writers, name="global-decode", role="decode")
        await up.ready()
        for hints, read, written in ((TIGHT, "read-2", "write-1"), (LOOSE, "read-2", "write-2"), (Hints(ttft_target_ms=50.0, itl_target_ms=5.0), "read-1", "write-1")):
            tokens, generation = await up.ask(hints, tokens=20)
            assert tokens == expected
            assert [label.rpartition("-")[0] for label in generation.workers] == ["global-prefill", "global-decode"]
            stories = [await up.cluster.catalog.further(decision) for decision in generation.decisions]
            assert [story[0]["served"] for story in stories] == [read, written]
            assert [story[0]["request"]["role"] for story in stories] == ["prefill", "decode"]
            assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(PROMPT), 20)
        for numbers in up.of.values():
            for number in numbers:
                engine: Any = up.cluster.worker(number).engine
                await until(lambda engine=engine: engine._scheduler.pool.used == 0)


@pytest.mark.slow
async def test_a_pool_may_itself_read_and_write_on_different_workers() -> None:
    expected = await alone(20)
    async with bare() as up:
        await up.worker("fast", sim(role="prefill"))
        await up.worker("fast", sim(role="decode"))
        await up.worker("slow")
        await up.router(FAST, SLOW)
        await up.ready()
        tokens, generation = await up.ask(TIGHT, tokens=20)
        assert tokens == expected
        choice, *inner = await up.story(generation)
        assert choice["served"] == "fast"
        assert [decision["outcome"] for decision in inner] == ["done", "done"]
        labels = {number: up.cluster.worker(number).runtime.instance("backend", "generate").label for number in up.of["fast"]}
        assert [decision["labels"] for decision in inner] == [[label] for label in labels.values()]


async def test_workers_that_must_meet_each_other_are_refused_in_pools_of_one_role() -> None:
    async with bare() as up:
        await up.worker("fast", sim(role="decode"))
        await up.worker("slow", sim(role="decode", protocol="bootstrap"))
        router = await up.router(FAST, SLOW, role="decode", startup=0.0)
        await until(lambda: "hand over by the protocol bootstrap" in router.problems().get("pool slow", ""))
        assert router._pools[0].look().row.state == "ready"


# ---------------------------------------------------------------------- strategies and mistakes


@attrs.define
class Broken:
    def bind(self, pools, role):
        pass

    def choose(self, request, pools):
        raise ZeroDivisionError("no idea")


async def test_a_strategy_that_breaks_is_left_out_and_counted() -> None:
    async with site() as up:
        router = up.routers[0]
        router._strategy = Broken()
        tokens, generation = await up.ask(LOOSE)
        assert len(tokens) == 10
        choice = (await up.story(generation))[0]
        assert (choice["served"], choice["kind"]) == ("fast", "fallback")
        assert "ZeroDivisionError: no idea" in choice["why"]
        assert b"dynamo_global_router_strategy_faults_total 1.0" in router.metrics()


@pytest.mark.parametrize(("options", "message"), [
    ({"pools": [FAST], "strategy": {"use": "grid", "table": [["quick"]], "ttft_ms": {"min": 0, "max": 1, "steps": 1}, "itl_ms": {"min": 0, "max": 1, "steps": 1}}},
     "names the pool 'quick', which is not among the pools: fast"),
    ({"pools": [{**FAST, "router": {"scorers": [{"use": "kv-plus"}], "use": "random"}}]}, "random"),
    ({"pools": [{**FAST, "namespace": "dynamo"}]}, "the namespace of the global router itself, 'dynamo'"),
    ({"pools": [FAST], "dynamo_json": "/x.json"}, "keep one of `pools` and `dynamo_json`"),
    ({"dynamo_json": "/nowhere/x.json"}, "/nowhere/x.json"),
])
async def test_a_router_that_cannot_work_does_not_start_and_fails_its_check(options, message) -> None:
    async with bare() as up:
        with pytest.raises(ConfigError, match=message):
            build(Use("global-router", options), "engine", up.cluster.plugins).check(up.cluster.config, up.cluster.plugins)
        with pytest.raises(ConfigError, match=message):
            await up.cluster.add(engine=Use("global-router", options), name="global")
