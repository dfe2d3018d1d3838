"""A pooling model: vectors, through the whole pipeline."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.config.schema import Use
from dynamo_core.context import Context
from dynamo_core.errors import RequestError
from dynamo_core.testing.cluster import Cluster
from dynamo_core.types import Request, Stops, TextOptions

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(make_engine: Callable[..., Any]) -> AsyncIterator[Cluster]:
    engine = make_engine(args={"runner": "pooling"})
    async with Cluster.up(workers=0, engine=Use("vllm", {"model": engine.model, "args": engine.args, "start_method": "fork"})) as cluster:
        await cluster.add()
        await cluster.wait_ready(1)
        yield cluster


async def vector(cluster: Cluster, prompt: list[int]) -> list[float]:
    request = Request(id=f"e{prompt[0]}", model="tiny", token_ids=prompt, stops=Stops(max_tokens=1))
    generation = await cluster.model.start(request, TextOptions(), Context(request.id))
    found: list[float] | None = None
    while deltas := await generation.read():
        for delta in deltas:
            found = delta.embedding or found
    assert found is not None
    assert generation.usage.prompt_tokens == len(prompt)
    return found


async def test_a_pooling_model_offers_vectors_and_nothing_else(cluster: Cluster) -> None:
    card = cluster.model.card
    assert (card.surfaces, card.capabilities, card.kv_events) == (("embeddings", "score"), ("embeddings",), False)


async def test_vectors_have_length_one_and_differ_by_input_and_not_by_company(cluster: Cluster) -> None:
    alone = [await vector(cluster, [5 + i, 6, 7, 8]) for i in range(8)]
    together = await asyncio.gather(*(vector(cluster, [5 + i, 6, 7, 8]) for i in range(8)))
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert math.hypot(*one) == pytest.approx(1.0, abs=1e-4)
    assert len({tuple(v) for v in alone}) == 8


async def test_an_input_that_does_not_fit_is_refused(cluster: Cluster) -> None:
    with pytest.raises(RequestError):
        await vector(cluster, [5] * 600)
