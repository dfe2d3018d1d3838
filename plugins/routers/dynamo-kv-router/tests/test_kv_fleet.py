"""Workers, event plane and router together, in one process: prediction meets reality, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Router, Use
from dynamo_core.kv.wire import Ask, decode_news, encode
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.runtime import relay as relays
from dynamo_core.runtime.relay import KvRelay
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_kv_router.facts import INDEX_PROBLEM, INDEX_STATE, PREDICTED_TOKENS

# Small caches, so that blocks are evicted all the time.
ENGINE = {"speedup": 0, "block_size": 16, "total_blocks": 256, "context_length": 2048}


def stack(**options: Any) -> Router:
    return Router(scorers=(Use("kv-overlap"), Use("load", weight=0.2)), facts=(Use("kv-index", options),))


@pytest.fixture(autouse=True)
def _quick_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relays, "PULSE", 0.05)


@pytest.fixture
async def cluster() -> AsyncGenerator[Cluster]:
    async with Cluster.up(workers=4, engine="sim", options=ENGINE, router=stack(silence=1.0)) as cluster:
        yield cluster


def relay(cluster: Cluster, number: int) -> KvRelay:
    found = cluster.worker(number)._relay  # pyright: ignore[reportPrivateUsage]
    assert found is not None
    return found


def lose(relay: KvRelay, share: Callable[[], bool]) -> Callable[[], None]:
    """Lose some of what it publishes. Returns what ends that."""
    publish = relay._publish  # pyright: ignore[reportPrivateUsage]
    relay._publish = lambda payload: None if share() else publish(payload)  # pyright: ignore[reportPrivateUsage]

    def end() -> None:
        relay._publish = publish  # pyright: ignore[reportPrivateUsage]

    return end


class Prompts:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.roots = [self.tokens(self.rng.randrange(40, 600)) for _ in range(8)]

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(5, 200) for _ in range(count)]

    def __call__(self) -> list[int]:
        root = self.rng.choice(self.roots)
        return root[: self.rng.randrange(20, len(root))] + self.tokens(self.rng.randrange(1, 80))


async def ask(cluster: Cluster, prompt: list[int], catalog: FleetCatalog | None = None) -> tuple[int, int, dict[str, Any]]:
    """What was predicted of the worker, what its engine reports, and its facts."""
    generation = await cluster.generate(prompt, max_tokens=4)
    await read_all(generation)
    decision = (catalog or cluster.catalog)._ring.get(generation.decisions[-1])  # pyright: ignore[reportPrivateUsage]
    assert decision is not None
    assert decision.worker is not None
    row = decision.workers.index(decision.worker)
    return decision.overlap_tokens, generation.usage.cached_tokens, {fact.name: column[row] for fact, column in decision.columns.items()}


async def quiet() -> None:
    """Longer than news wait to travel together, and than lost ones take to be noticed."""
    await asyncio.sleep(0.04)


async def eventually(true: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


def states(cluster: Cluster) -> set[str]:
    return {row["facts"][INDEX_STATE.name] for rows in cluster.catalog.routers().values() for row in rows}


async def predictions_hold(cluster: Cluster, prompts: Prompts, count: int = 40) -> int:
    """Tokens that were found in caches, each of them foretold."""
    hits = 0
    for _ in range(count):
        predicted, actual, _ = await ask(cluster, prompts())
        assert predicted == actual
        hits += actual
        await quiet()
    return hits


async def test_engines_find_in_their_caches_what_the_router_predicted(cluster: Cluster):
    await eventually(lambda: states(cluster) == {"events"})
    assert await predictions_hold(cluster, Prompts(1), 80) > 3000
    assert not cluster.catalog.problems()


async def test_after_lost_events_prediction_meets_reality_again(cluster: Cluster):
    prompts, rng = Prompts(2), random.Random(3)
    endings = [lose(relay(cluster, i), lambda: rng.random() < 0.4) for i in range(4)]
    for _ in range(40):
        await ask(cluster, prompts())
        await asyncio.sleep(0.015)
    for end in endings:
        end()
    await asyncio.sleep(0.3)
    assert await predictions_hold(cluster, prompts) > 1000


async def test_when_workers_die_and_others_join_prediction_holds(cluster: Cluster):
    prompts = Prompts(4)
    await predictions_hold(cluster, prompts, 20)
    await cluster.kill(0)
    await cluster.drain(1)
    await cluster.add()
    await cluster.wait_ready(3)
    await asyncio.sleep(0.3)
    assert await predictions_hold(cluster, prompts) > 1000


async def test_a_router_that_comes_late_gets_the_whole_picture(cluster: Cluster):
    prompts = Prompts(5)
    await predictions_hold(cluster, prompts, 30)
    await asyncio.sleep(0.1)
    async with Runtime.open(cluster.config, cluster.plugins) as runtime, FleetCatalog.open(runtime, CollectorRegistry()) as late:
        first, cluster.catalog = cluster.catalog, late
        try:
            await cluster.wait_ready(4)
            await eventually(lambda: states(cluster) == {"events"})
            assert await predictions_hold(cluster, prompts, 20) > 500
        finally:
            cluster.catalog = first


async def test_a_worker_whose_events_stop_is_degraded_by_name_and_heals(cluster: Cluster):
    prompts = Prompts(6)
    await predictions_hold(cluster, prompts, 10)
    end = lose(relay(cluster, 2), lambda: True)
    await eventually(lambda: cluster.catalog.problems())
    ((name, problem),) = cluster.catalog.problems().items()
    assert name.startswith("kv backend-")
    assert "silent" in problem
    assert states(cluster) == {"events", "degraded"}
    for _ in range(30):  # It is still routed to, by what it was sent.
        _, _, facts = await ask(cluster, prompts())
        assert (facts[INDEX_STATE.name] == "degraded") == bool(facts[INDEX_PROBLEM.name])
    end()
    await eventually(lambda: states(cluster) == {"events"})
    assert not cluster.catalog.problems()
    await asyncio.sleep(0.2)
    await predictions_hold(cluster, prompts, 20)


async def test_an_engine_that_promises_events_and_reports_none_is_found_out():
    async with Cluster.up(workers=1, engine="sim", options=ENGINE, router=stack(silence=1.0)) as cluster:
        cluster.worker(0).engine._context.kv_events = lambda events, dp_rank: None  # type: ignore[attr-defined]
        relay(cluster, 0)._reported = False  # pyright: ignore[reportPrivateUsage]
        for _ in range(relays.SILENT_PROMPTS):
            await ask(cluster, list(range(5, 100)))
        await eventually(lambda: cluster.catalog.problems())
        assert "reported none" in str(cluster.catalog.problems())
        assert "reported none" in str(cluster.worker(0).problems())
        assert states(cluster) == {"degraded"}
        predicted, actual, _ = await ask(cluster, list(range(5, 100)))
        assert predicted == actual == 80, "what was sent is all there is to go by"


async def test_without_events_what_was_sent_is_assumed():
    async with Cluster.up(workers=3, engine="sim", options=ENGINE | {"kv_events": False}, router=stack()) as cluster:
        assert states(cluster) == {"approximate"}
        prompt = list(range(5, 150))
        assert (await ask(cluster, prompt))[:2] == (0, 0)
        predicted, actual, facts = await ask(cluster, prompt)
        assert predicted == actual == facts[PREDICTED_TOKENS.name] == 144
        assert not cluster.catalog.problems()


async def test_another_secret_is_a_named_problem(monkeypatch: pytest.MonkeyPatch):
    async with Cluster.up(workers=1, engine="sim", options=ENGINE, router=stack()) as cluster:
        await eventually(lambda: states(cluster) == {"events"})
        relay(cluster, 0)._hasher.fingerprint ^= 1  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: "another secret" in str(cluster.catalog.problems()))
        relay(cluster, 0)._hasher.fingerprint ^= 1  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: not cluster.catalog.problems())


async def test_rubbish_on_the_topic_is_counted_and_changes_nothing(cluster: Cluster):
    await eventually(lambda: states(cluster) == {"events"})
    publish = relay(cluster, 0)._publish  # pyright: ignore[reportPrivateUsage]
    for payload in (b"", b"rubbish", msgspec.msgpack.encode([1, 2, 3]), msgspec.msgpack.encode([1, 2, 0, "x", 16, []])):
        publish(payload)
    router = next(iter(cluster.catalog._models.values())).dispatcher("aggregated").router  # pyright: ignore[reportPrivateUsage]
    await eventually(lambda: router.faults["facts.kv-index"] == 4)
    await predictions_hold(cluster, Prompts(7), 10)


async def test_the_state_can_be_asked_for_from_anywhere_and_answers_what_was_asked(cluster: Cluster):
    await predictions_hold(cluster, Prompts(8), 20)
    worker = next(i for i in range(4) if relay(cluster, i)._ranks[0].id > 3)  # pyright: ignore[reportPrivateUsage]
    relayed = relay(cluster, worker)

    async def answer(question: bytes) -> list[Any]:
        return [decode_news(item) async for item in relayed.answer(question, None)]  # type: ignore[arg-type]

    whole = await answer(encode(Ask(0, 0, 0)))
    last = whole[-1].id
    assert all(news.whole for news in whole)
    assert [news.id for news in await answer(encode(Ask(whole[0].stream, 0, last - 2)))] == [last - 1, last]
    assert all(news.whole for news in await answer(encode(Ask(whole[0].stream + 1, 0, last - 2))))
    for question, complaint in ((b"?", "not a question"), (encode(Ask(0, 7, 0)), "no data-parallel rank 7")):
        with pytest.raises(Exception, match=complaint):
            await answer(question)
