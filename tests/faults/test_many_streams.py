"""A crowd on a real stack of processes."""

from __future__ import annotations

import asyncio
import resource

import httpx
import pytest

STREAMS = 1000


@pytest.mark.slow
async def test_a_thousand_streams_at_once_through_one_frontend_all_end_well(field, load_class) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        async with field(workers=2, frontends=1) as running:
            load = load_class(running.url, streams=0, tokens=20)
            await load.learn(4)
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(timeout=300.0, limits=limits) as client:
                answers = await asyncio.gather(*(load.ask(client, prompt) for prompt in list(load.expected) * (STREAMS // 4)))
            assert {answer for answer, _ in answers} == set(load.expected.values())
            assert {tokens for _, tokens in answers} == {20}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
async def test_a_fleet_that_is_full_refuses_in_openais_shape_and_serves_the_rest(field, load_class) -> None:
    async with field(workers=2, frontends=1, worker="max_requests = 2") as running:
        load = load_class(running.url, streams=0, tokens=100)
        async with httpx.AsyncClient(timeout=60.0) as client:
            await load.learn(1)
            prompt = next(iter(load.expected))
            answers = [text for text, _ in await asyncio.gather(*(load.ask(client, prompt) for _ in range(40)))]
            good = [text for text in answers if text == load.expected[prompt]]
            refused = [text for text in answers if text != load.expected[prompt]]
            assert len(good) >= 4
            assert refused
            assert [text for text in refused if not (text.startswith("HTTP 529") and '"code":"overloaded"' in text)] == []
            assert (await load.ask(client, prompt))[0] == load.expected[prompt]
