"""Images when one worker reads the prompt and another generates: what both say together is what one says alone."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Use
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.testing.cluster import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: pip install --no-deps nixl nixl-cu12"),
]

RED, BLUE = (255, 0, 0), (0, 0, 255)
CASES = [(RED,), (BLUE,), (RED, BLUE), (BLUE, RED), ()]


def use(seeing: Path, role: str, args: dict[str, Any]) -> Use:
    return Use("vllm", {"model": str(seeing), "args": args, "start_method": "fork", "role": role})


def front(cluster: Cluster) -> httpx.AsyncClient:
    app = create_app(cluster.config.frontend, cluster.catalog, metrics=HttpMetrics(CollectorRegistry()))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120)


async def say(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    body["dynamo"]["annotations"] = ["token_ids", "worker"]
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(seeing: Path, seeing_args: dict[str, Any], image_body: Any) -> list[list[int]]:
    async with Cluster.up(workers=1, engine=use(seeing, "aggregated", seeing_args)) as cluster, front(cluster) as client:
        return [(await say(client, image_body(*colors, text=LONG)))["dynamo"]["token_ids"][0] for colors in CASES]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(seeing: Path, seeing_args: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    async with Cluster.up(workers=0, engine=use(seeing, "aggregated", seeing_args)) as cluster:
        await cluster.add(engine=use(seeing, "prefill", seeing_args), name="prefill")
        await cluster.add(engine=use(seeing, "decode", seeing_args), name="decode")
        await cluster.wait_ready(2)
        async with front(cluster) as client:
            yield client


LONG = "The quick brown fox jumps over the lazy dog. " * 4
"""Several blocks, so that there is something to hand over."""


async def test_two_workers_say_of_images_what_one_says(client: httpx.AsyncClient, expected: list[list[int]], image_body: Any) -> None:
    for colors, tokens in zip(CASES, expected, strict=True):
        answer = await say(client, image_body(*colors, text=LONG))
        assert answer["dynamo"]["token_ids"][0] == tokens
        assert [worker.rpartition("-")[0] for worker in answer["dynamo"]["worker"]] == ["prefill", "decode"]
    assert len({tuple(expected[case]) for case in (0, 1, 4)}) == 3, "images decide what is said"


async def test_prefill_finds_an_image_that_it_has_read_before(client: httpx.AsyncClient, image_body: Any) -> None:
    async def cached(color: tuple[int, int, int]) -> int:
        body = image_body(color, text=LONG)
        body["messages"][0]["content"].append({"type": "text", "text": " and so on" * 40})
        return (await say(client, body))["usage"]["prompt_tokens_details"]["cached_tokens"]

    await cached((0, 255, 0))
    assert await cached((0, 255, 0)) > await cached((255, 255, 255)) > 0
