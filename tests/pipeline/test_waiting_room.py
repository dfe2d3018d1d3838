"""The queue in the pipeline: real workers, real streams."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Queue, QueueClass, Router
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled
from dynamo_core.pipeline.waiting import QueueFamilies, QueueMetrics
from dynamo_core.testing.cluster import Cluster, read_all


def waiting(cluster: Cluster) -> int:
    return sum(d.waiting for m in cluster.catalog.models() for d in m.dispatchers.values())  # type: ignore[attr-defined]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_requests_beyond_the_room_wait_and_all_are_answered():
    router = Router(queue=Queue(prefill_tokens=0))
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.02}, router=router) as cluster:
        async def one(i: int) -> str:
            return (await read_all(await cluster.generate(f"hello {i}", max_tokens=8)))[0]

        answers = await asyncio.gather(*(one(i) for i in range(12)))
        assert all(answers)
        assert waiting(cluster) == 0
        waits = [cluster.catalog.decision(f"{d.id}")["waited"] for d in cluster.catalog._ring]
        assert max(waits) > 0.0
        sample = cluster.registry.get_sample_value("dynamo_router_queue_seconds_count", {"model": cluster.model.name, "class": "default"})
        assert sample == 12


async def test_a_caller_who_leaves_the_queue_frees_its_place_and_a_full_queue_says_so():
    router = Router(queue=Queue(prefill_tokens=0, limit=1))
    async with Cluster.up(workers=1, engine="echo", options={"delay": 0.5}, router=router) as cluster:
        first = asyncio.create_task(cluster.generate("hello", max_tokens=4))
        await until(first.done)
        context = Context("leaves")
        second = asyncio.create_task(cluster.generate("hello", max_tokens=4, context=context))
        await until(lambda: waiting(cluster) == 1)
        with pytest.raises(AllBusy):
            await cluster.generate("hello", max_tokens=4)
        context.cancel("left")
        with pytest.raises(Cancelled):
            await second
        assert waiting(cluster) == 0
        third = asyncio.create_task(cluster.generate("hello", max_tokens=4))
        await until(lambda: waiting(cluster) == 1)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert waiting(cluster) == 0
        first.result().cancel()


async def test_a_deadline_ends_the_wait():
    router = Router(queue=Queue(prefill_tokens=0))
    async with Cluster.up(workers=1, engine="echo", options={"delay": 1.0}, router=router) as cluster:
        first = await cluster.generate("hello", max_tokens=4)
        loop_now = __import__("time").monotonic()
        with pytest.raises(Cancelled):
            await cluster.generate("hello", max_tokens=4, context=Context("late", deadline=loop_now + 0.2))
        assert waiting(cluster) == 0
        first.cancel()


async def test_a_reload_changes_the_queue_for_those_who_wait_and_nobody_is_overtaken_because_he_came_before_it():
    router = Router(queue=Queue(prefill_tokens=0, classes=(QueueClass("one"),)))
    async with Cluster.up(workers=1, engine="echo", options={"delay": 0.3}, router=router) as cluster:
        def reload(queue: Queue) -> None:
            cluster.catalog.stacks.reload(attrs.evolve(cluster.config, router=Router(queue=queue)), cluster.config)

        def shown(of: str) -> float | None:
            return cluster.registry.get_sample_value("dynamo_router_queue_waiting", {"model": cluster.model.name, "class": of})

        first = asyncio.create_task(cluster.generate("hello", max_tokens=4))
        await until(first.done)
        order: list[str] = []

        async def ask(name: str, before: int) -> asyncio.Task[None]:
            async def one() -> None:
                generation = await cluster.generate(name, max_tokens=1)
                order.append(name)
                await read_all(generation)

            task = asyncio.create_task(one())
            await until(lambda: waiting(cluster) == before + 1)
            return task

        tasks = [await ask("b", 0), await ask("c", 1)]
        assert shown("one") == 2
        reload(Queue(prefill_tokens=0, limit=1, classes=(QueueClass("other"),)))
        with pytest.raises(AllBusy):
            await cluster.generate("d", max_tokens=1)
        assert (shown("one"), shown("other")) == (0, 2)
        reload(Queue(prefill_tokens=0))
        tasks += [await ask("e", 2)]
        await asyncio.gather(read_all(first.result()), *tasks)
        assert order == ["b", "c", "e"]


async def test_a_queue_that_is_turned_off_lets_everybody_go():
    router = Router(queue=Queue(prefill_tokens=0))
    async with Cluster.up(workers=1, engine="echo", options={"delay": 1.0}, router=router) as cluster:
        running = [asyncio.create_task(cluster.generate("hello", max_tokens=4)) for _ in range(3)]
        await until(lambda: waiting(cluster) == 2)
        cluster.catalog.stacks.reload(attrs.evolve(cluster.config, router=Router(queue=Queue(enabled=False))), cluster.config)
        for started in await asyncio.gather(*running):
            started.cancel()


def test_the_gauge_counts_those_who_wait_in_the_queues_of_all_roles() -> None:
    registry = CollectorRegistry()
    families = QueueFamilies(registry)
    prefill, decode = QueueMetrics(families, "m"), QueueMetrics(families, "m")
    prefill.length({"default": 3})
    decode.length({"default": 2})
    decode.length({"default": 0})
    assert registry.get_sample_value("dynamo_router_queue_waiting", {"model": "m", "class": "default"}) == 3
