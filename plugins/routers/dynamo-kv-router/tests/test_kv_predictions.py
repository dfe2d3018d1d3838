"""What the router believed of a cache, beside what the engine said: in the record of the request, and summed up in metrics."""

from __future__ import annotations

import asyncio
import random

import pytest

from dynamo_core.config.schema import Router, Use
from dynamo_core.runtime import relay as relays
from dynamo_core.testing.cluster import Cluster, read_all

ENGINE = {"speedup": 0, "block_size": 16, "total_blocks": 64, "context_length": 1024}


class Asker:
    """Prompts with shared beginnings, one after the other."""

    def __init__(self, cluster: Cluster, model: str, answer: int = 2) -> None:
        self.cluster, self.model, self.answer = cluster, model, answer
        self.rng = random.Random(3)
        self.roots = [self.tokens(300) for _ in range(4)]

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(5, 200) for _ in range(count)]

    async def ask(self) -> tuple[int, int, str]:
        """Predicted, found, and the decision as text."""
        generation = await self.cluster.generate(self.rng.choice(self.roots)[: self.rng.randrange(100, 300)] + self.tokens(20), max_tokens=self.answer)
        await read_all(generation)
        record = self.cluster.catalog.decision(generation.decisions[0])
        assert record is not None
        return record["overlap_tokens"], record["cached_tokens"], record["text"]

    def sample(self, name: str, **labels: str) -> float:
        value = self.cluster.registry.get_sample_value(f"dynamo_router_{name}", {"model": self.model, **labels})
        assert value is not None
        return value

    def agrees(self, asked: list[tuple[int, int, str]]) -> None:
        """The metrics are the sums of the records."""
        errors = [found - predicted for predicted, found, _ in asked]
        assert self.sample("predicted_cached_tokens_total") == sum(predicted for predicted, _, _ in asked)
        assert self.sample("found_cached_tokens_total") == sum(found for _, found, _ in asked)
        assert self.sample("prediction_error_tokens_count") == len(asked)
        too_much = self.sample("prediction_error_tokens_bucket", le="-1.0")
        assert (too_much, self.sample("prediction_error_tokens_bucket", le="0.0") - too_much) == (sum(e < 0 for e in errors), errors.count(0))


async def test_with_events_every_prediction_is_what_the_engine_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "PULSE", 0.05)
    stack = Router(scorers=(Use("kv-overlap"), Use("load", weight=0.2)))
    async with Cluster.up(workers=2, engine="sim", options=ENGINE, router=stack) as cluster:
        asker = Asker(cluster, cluster.model.name)
        asked = []
        for _ in range(25):
            asked.append(await asker.ask())
            await asyncio.sleep(0.03)  # for the news of it
        assert all(predicted == found for predicted, found, _ in asked)
        assert sum(found for _, found, _ in asked) > 1000
        assert f"cache      {asked[-1][0]} tokens predicted, {asked[-1][1]} found\n" in asked[-1][2]
        asker.agrees(asked)


async def test_without_events_what_was_evicted_unheard_shows_as_promised_too_much() -> None:
    # Answers push prompts out of the cache, and nobody tells the router.
    stack = Router(scorers=(Use("kv-overlap"),), facts=(Use("kv-index", {"mode": "approximate"}),))
    async with Cluster.up(workers=1, engine="sim", options={**ENGINE, "kv_events": False}, router=stack) as cluster:
        asker = Asker(cluster, cluster.model.name, answer=200)
        asker.roots = [asker.tokens(300) for _ in range(8)]
        asked = [await asker.ask() for _ in range(30)]
        worst = min(asked, key=lambda a: a[1] - a[0])
        assert worst[1] < worst[0]
        assert f"cache      {worst[0]} tokens predicted, {worst[1]} found ({worst[1] - worst[0]:+d})" in worst[2]
        asker.agrees(asked)


async def test_what_decode_workers_fetch_from_prefill_workers_is_no_prediction() -> None:
    async with Cluster.up(workers=0, engine="sim", options=ENGINE, router=Router(use=Use("kv"))) as cluster:
        for role in ("prefill", "decode"):
            await cluster.add(engine=Use("sim", {**ENGINE, "role": role}), name=role)
        await cluster.wait_ready(2)
        asker = Asker(cluster, cluster.model.name)
        for _ in range(5):
            await asker.ask()
        assert asker.sample("prediction_error_tokens_count") == 5
