"""A global router chooses pools, whatever they are made of."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
from global_site import FAST, LOOSE, PROMPT, SLOW, TIGHT, alone, bare, sim, site, until
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.config import build
from dynamo_core.config.schema import Use
from dynamo_core.errors import ConfigError, PromptTooLong
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Request

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
