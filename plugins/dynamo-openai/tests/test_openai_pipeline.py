"""Plain servers in a fleet: what the frontend's pipeline makes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynamo_core.config.schema import Use
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.testing.servers import free_port

PROMPT = list(b"Hello, world! How are you?" * 3)


def use(server: Any, folder: Path) -> Use:
    return Use("openai", {"url": server.url, "tokenizer": str(folder), "poll_interval": 0.05})


async def until(condition: Callable[[], Any], what: str) -> None:
    try:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never {what}") from None


async def test_a_decision_knows_what_was_cached_although_the_server_tells_it_last(wire: Any, folder: Path) -> None:
    async with wire.serving(kv=(free_port(), free_port())) as server, Cluster.up(workers=1, engine=use(server, folder)) as cluster:
        for expected in (0, 64):
            generation = await cluster.generate(PROMPT, max_tokens=6)
            assert len((await read_all(generation))[1]) == 6
            assert generation.usage.cached_tokens == expected
            assert cluster.catalog.decision(generation.decisions[-1])["cached_tokens"] == expected


async def test_a_block_size_that_is_not_the_servers_is_named(wire: Any, folder: Path) -> None:
    async with wire.serving(kv=(free_port(), free_port())) as server:
        options = {"url": server.url, "tokenizer": str(folder), "block_size": 8}
        async with Cluster.up(workers=1, engine=Use("openai", options)) as cluster:
            await read_all(await cluster.generate(PROMPT, max_tokens=2))
            await until(lambda: "kv rank 0" in cluster.worker(0).problems(), "named")
            assert "blocks of 16 tokens, and its card says 8" in cluster.worker(0).problems()["kv rank 0"]


async def test_a_request_goes_on_token_for_token_when_its_server_is_lost_and_the_server_is_used_again_when_it_is_back(wire: Any, folder: Path) -> None:
    settings = {"canary_interval": 0.1}
    async with wire.serving(step=0.01) as one, wire.serving(step=0.01) as other, Cluster.up(workers=1, engine=use(one, folder), settings=settings) as cluster:
        expected = (await read_all(await cluster.generate(PROMPT, max_tokens=60, ignore_eos=True)))[1]
        await cluster.add(engine=use(other, folder))
        await cluster.wait_ready(2)
        generations = [await cluster.generate(PROMPT, max_tokens=60, ignore_eos=True) for _ in range(4)]
        reading = [asyncio.create_task(read_all(generation)) for generation in generations]
        await until(lambda: one.running and other.running, "both busy")
        await asyncio.sleep(0.1)
        await one.stop()
        assert [(await read)[1] for read in reading] == [expected] * 4
        await cluster.wait_ready(1)
        await one.start()
        await cluster.wait_ready(2)
