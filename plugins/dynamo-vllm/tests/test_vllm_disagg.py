"""Prefill and decode on two real vLLM engines, KV blocks through NIXL, behind the whole pipeline."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.config.schema import Use
from dynamo_core.testing.cluster import Cluster, read_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: pip install --no-deps nixl nixl-cu12"),
]

PROMPTS = [[50 + i, *range(10, 10 + 137 + 13 * i)] for i in range(6)]


def use(make_engine: Callable[..., Any], role: str) -> Use:
    engine = make_engine(role=role)
    return Use("vllm", {"model": engine.model, "args": engine.args, "start_method": "fork", "role": role})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(make_engine: Callable[..., Any]) -> list[list[int]]:
    async with Cluster.up(workers=1, engine=use(make_engine, "aggregated")) as cluster:
        return [(await read_all(await cluster.generate(prompt, max_tokens=24, ignore_eos=True)))[1] for prompt in PROMPTS]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(make_engine: Callable[..., Any]) -> AsyncIterator[Cluster]:
    async with Cluster.up(workers=0, engine=use(make_engine, "aggregated")) as cluster:
        await cluster.add(engine=use(make_engine, "prefill"), name="prefill")
        await cluster.add(engine=use(make_engine, "decode"), name="decode")
        await cluster.wait_ready(2)
        yield cluster


def used_blocks(cluster: Cluster, number: int) -> int:
    engine: Any = cluster.worker(number).engine
    return engine._running._loads.used_blocks


async def free(cluster: Cluster) -> None:
    async with asyncio.timeout(60):
        while used_blocks(cluster, 0) or used_blocks(cluster, 1):
            await asyncio.sleep(0.05)


async def test_what_two_workers_say_is_what_one_says(cluster: Cluster, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        generation = await cluster.generate(prompt, max_tokens=24, ignore_eos=True)
        assert (await read_all(generation))[1] == tokens
        assert [label.rpartition("-")[0] for label in generation.workers] == ["prefill", "decode"]
        assert len(generation.decisions) == 2
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(prompt), 24)
    await free(cluster)


async def test_a_crowd_is_handed_over_without_mixing_anybody_up(cluster: Cluster, expected: list[list[int]]) -> None:
    async def one(i: int) -> None:
        generation = await cluster.generate(PROMPTS[i % 6], max_tokens=24, ignore_eos=True)
        assert (await read_all(generation))[1] == expected[i % 6]

    await asyncio.gather(*(one(i) for i in range(24)))
    await free(cluster)


async def test_cached_tokens_are_those_of_the_worker_that_read_the_prompt(cluster: Cluster) -> None:
    prompt = [900 - i for i in range(150)]
    first = await cluster.generate(prompt, max_tokens=4, ignore_eos=True)
    await read_all(first)
    second = await cluster.generate(prompt, max_tokens=4, ignore_eos=True)
    await read_all(second)
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 128)


async def test_a_thousand_requests_cancelled_at_any_moment_leave_no_block_behind(cluster: Cluster, expected: list[list[int]]) -> None:
    async def leave(i: int) -> None:
        prompt = [4 + i % 900, *PROMPTS[i % 6]]
        if i % 3 == 0:  # while prefill is on its way
            starting = asyncio.create_task(cluster.generate(prompt, max_tokens=200, ignore_eos=True))
            await asyncio.sleep(0.002 * (i % 10))
            starting.cancel()
            ended = (await asyncio.gather(starting, return_exceptions=True))[0]
            if not isinstance(ended, BaseException):
                ended.cancel()
            return
        generation = await cluster.generate(prompt, max_tokens=200, ignore_eos=True)
        if i % 3 == 1:
            await generation.read()
        generation.cancel()

    for batch in range(0, 1000, 20):
        await asyncio.gather(*(leave(batch + i) for i in range(20)))
    await free(cluster)
    assert (await read_all(await cluster.generate(PROMPTS[0], max_tokens=24, ignore_eos=True)))[1] == expected[0]


async def test_a_worker_whose_blocks_would_not_fit_is_refused_before_its_first_request(cluster: Cluster, make_engine: Callable[..., Any]) -> None:
    odd = use(make_engine, "decode")
    odd = Use("vllm", {**odd.options, "args": {**odd.options["args"], "dtype": "bfloat16"}})
    number = await cluster.add(engine=odd, name="odd")
    async with asyncio.timeout(60):
        while not any("dtype is torch.bfloat16 here and torch.float32 there" in why for why in cluster.catalog.problems().values()):
            await asyncio.sleep(0.05)
    await cluster.drain(number)


async def test_without_prefill_workers_decode_reads_the_prompt_itself(cluster: Cluster, expected: list[list[int]]) -> None:
    await cluster.drain(0)
    await cluster.wait_ready(1)
    generation = await cluster.generate(PROMPTS[1], max_tokens=24, ignore_eos=True)
    assert (await read_all(generation))[1] == expected[1]
    assert [label.rpartition("-")[0] for label in generation.workers] == ["decode"]
