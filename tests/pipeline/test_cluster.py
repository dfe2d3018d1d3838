"""A fleet in one process, from prompt to text."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_core.config.schema import Migration
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, ModelNotFound, Unavailable
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints


async def test_a_prompt_is_answered_and_counted() -> None:
    async with Cluster.up(workers=2) as cluster:
        generation = await cluster.generate("hello world", max_tokens=5)
        text, ids, reason = await read_all(generation)
        assert (text, reason) == ("hello", "length")
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (11, 5) == (11, len(ids))


async def test_a_stop_string_ends_the_text_and_the_work() -> None:
    async with Cluster.up(workers=1, options={"delay": 0.01}) as cluster:
        generation = await cluster.generate("one two three four", max_tokens=18, stop=["thr"])
        text, ids, reason = await read_all(generation)
        assert (text, reason) == ("one two ", "stop")
        assert generation.usage.completion_tokens == len(ids) == len("one two thr")
        await asyncio.sleep(0.05)
        assert cluster.worker(0).admission.in_flight == 0


async def test_the_decision_says_who_served_it_and_how_it_ended() -> None:
    async with Cluster.up(workers=3) as cluster:
        generation = await cluster.generate("hello")
        await read_all(generation)
        record = cluster.catalog.decision(generation.decisions[0])
        assert record is not None
        assert record["outcome"] == "done"
        assert generation.workers[0] in record["text"]


async def test_round_robin_gives_every_worker_its_turn() -> None:
    async with Cluster.up(workers=3) as cluster:
        served: list[str] = []
        for _ in range(6):
            generation = await cluster.generate("hi", max_tokens=1)
            await read_all(generation)
            served += generation.workers
        assert sorted(served) == sorted(2 * served[:3])


async def test_a_lost_worker_costs_nothing_but_time() -> None:
    prompt = "the quick brown fox jumps over the lazy dog, again and again and again"
    async with Cluster.up(workers=2, options={"delay": 0.005}) as cluster:
        generation = await cluster.generate(prompt, max_tokens=60)
        first = await generation.read()
        serving = next(i for i in range(2) if cluster.worker(i).admission.in_flight)
        await cluster.kill(serving)
        text, _, reason = await read_all(generation)
        assert first[0].text + text == prompt[:60]
        assert reason == "length"
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(prompt), 60)
        assert len(generation.workers) == 2


async def test_a_request_waits_for_a_replacement_when_nobody_is_left() -> None:
    async with Cluster.up(workers=1, options={"delay": 0.005}) as cluster:
        generation = await cluster.generate("a" * 100, max_tokens=100)
        await generation.read()
        await cluster.kill(0)
        adding = asyncio.create_task(cluster.add())
        _, _, reason = await read_all(generation)
        await adding
        assert reason == "length"
        assert generation.usage.completion_tokens == 100


async def test_without_a_replacement_the_error_says_so() -> None:
    async with Cluster.up(workers=1, options={"delay": 0.005}, migration=Migration(wait=0.2, inhibit=0.1)) as cluster:
        generation = await cluster.generate("a" * 100, max_tokens=100)
        await generation.read()
        await cluster.kill(0)
        with pytest.raises(Unavailable, match=r"no other worker was there within 0\.2 s"):
            await read_all(generation)


async def test_a_pinned_request_does_not_move() -> None:
    async with Cluster.up(workers=2, options={"delay": 0.005}) as cluster:
        pin = Hints(instance=cluster.worker(0).runtime.id)
        generation = await cluster.generate("a" * 100, max_tokens=100, hints=pin)
        await generation.read()
        await cluster.kill(0)
        with pytest.raises(Unavailable, match="pinned"):
            await read_all(generation)


async def test_a_draining_worker_finishes_what_it_has() -> None:
    async with Cluster.up(workers=2, options={"delay": 0.005}) as cluster:
        generation = await cluster.generate("a" * 50, max_tokens=50)
        await generation.read()
        serving = next(i for i in range(2) if cluster.worker(i).admission.in_flight)
        draining = asyncio.create_task(cluster.drain(serving))
        _, _, reason = await read_all(generation)
        await draining
        assert reason == "length"
        assert len(generation.workers) == 1


async def test_what_a_drain_cuts_short_moves_to_another_worker() -> None:
    async with Cluster.up(workers=2, options={"delay": 0.02}, settings={"drain_timeout": 0.2}) as cluster:
        generation = await cluster.generate("a" * 100, max_tokens=100)
        await generation.read()
        serving = next(i for i in range(2) if cluster.worker(i).admission.in_flight)
        await cluster.drain(serving)
        _, _, reason = await read_all(generation)
        assert reason == "length"
        assert generation.usage.completion_tokens == 100


async def test_a_worker_at_its_limit_passes_the_request_on() -> None:
    async with Cluster.up(workers=2, options={"delay": 0.01}, settings={"max_requests": 1}) as cluster:
        both = [await cluster.generate("a" * 20, max_tokens=20) for _ in range(2)]
        with pytest.raises(AllBusy):
            await read_all(await cluster.generate("a", max_tokens=1))
        for generation in both:
            assert (await read_all(generation))[2] == "length"


async def test_cancelling_frees_the_worker() -> None:
    async with Cluster.up(workers=1, options={"delay": 0.01}) as cluster:
        context = Context("leaving")
        generation = await cluster.generate("a" * 1000, max_tokens=1000, context=context)
        await generation.read()
        context.cancel("gone")
        with pytest.raises(Cancelled):
            while await generation.read():
                pass
        async with asyncio.timeout(5):
            while cluster.worker(0).admission.in_flight:
                await asyncio.sleep(0.01)


async def test_an_unknown_model_is_named_with_those_that_are_there() -> None:
    async with Cluster.up(workers=1) as cluster:
        with pytest.raises(ModelNotFound, match="echo"):
            cluster.catalog.get("gpt-17")


async def test_a_model_without_workers_says_when_the_last_one_left() -> None:
    async with Cluster.up(workers=1) as cluster:
        name = cluster.model.name
        await cluster.drain(0)
        async with asyncio.timeout(5):
            while cluster.catalog.models():
                await asyncio.sleep(0.01)
        with pytest.raises(Unavailable, match="the last one left"):
            cluster.catalog.get(name)
        assert cluster.catalog.not_ready() is not None


async def test_a_request_that_lost_its_worker_waits_while_the_others_are_full() -> None:
    async with Cluster.up(workers=2, options={"delay": 0.02}, settings={"max_requests": 2}, migration=Migration(limit=1, wait=10.0, inhibit=0.1)) as cluster:
        running = [await cluster.generate("a" * 40, max_tokens=40) for _ in range(4)]
        for generation in running:
            await generation.read()
        await cluster.kill(0)
        ended = await asyncio.gather(*(read_all(generation) for generation in running))
        assert [reason for _, _, reason in ended] == ["length"] * 4
        assert [generation.usage.completion_tokens for generation in running] == [40] * 4


async def test_a_newcomer_to_a_full_fleet_is_told_at_once_also_while_the_full_are_avoided() -> None:
    async with Cluster.up(workers=1, options={"delay": 0.05}, settings={"max_requests": 1}) as cluster:
        running = await cluster.generate("a" * 20, max_tokens=20)
        await running.read()
        for _ in range(3):  # the first is refused by the worker, the others by the router that avoids it
            with pytest.raises(AllBusy):
                await read_all(await cluster.generate("a", max_tokens=1))
        assert (await read_all(running))[2] == "length"
