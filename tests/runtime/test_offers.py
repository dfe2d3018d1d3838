"""What an engine offers while it runs: adapters come and go as models of their own, and an engine asleep offers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dynamo_core.context import Context
from dynamo_core.errors import ModelNotFound, Unavailable
from dynamo_core.runtime import names
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Request, Stops, TextOptions


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def ready(cluster: Cluster) -> list[str]:
    return [model.name for model in cluster.catalog.models()]


def adapter(cluster: Cluster, name: str, number: int = 0) -> Any:
    card = cluster.worker(number).card
    assert card is not None
    return msgspec.structs.replace(card, name=name, adapter=name, aliases=())


async def answer(cluster: Cluster, model: str) -> str:
    served = cluster.catalog.get(model)
    ids = await served.preprocessor.encode("hello", add_special_tokens=False)
    request = Request(id=f"r-{model}", model=model, token_ids=ids, stops=Stops(max_tokens=5))
    return (await read_all(await served.start(request, TextOptions(), Context(request.id))))[0]


async def test_an_adapter_is_a_model_as_long_as_it_is_offered_and_its_base_stays() -> None:
    async with Cluster.up(workers=1) as cluster:
        worker = cluster.worker(0)
        base = worker.card
        assert base is not None
        worker._offer((base, adapter(cluster, "org/sql"), adapter(cluster, "law")))
        await until(lambda: ready(cluster) == ["echo", "law", "org/sql"])
        assert await answer(cluster, "org/sql") == await answer(cluster, "echo") == "hello"
        worker._offer((base, adapter(cluster, "law")))
        await until(lambda: ready(cluster) == ["echo", "law"])
        with pytest.raises((ModelNotFound, Unavailable)):
            cluster.catalog.get("org/sql")
        assert await answer(cluster, "law") == "hello"


async def test_an_adapter_of_two_workers_stays_while_one_of_them_offers_it() -> None:
    async with Cluster.up(workers=2) as cluster:
        for number in (0, 1):
            card = cluster.worker(number).card
            assert card is not None
            cluster.worker(number)._offer((card, adapter(cluster, "law", number)))
        await until(lambda: len(cluster.catalog.status()["models"].get("law", {"workers": ()})["workers"]) == 2)
        await cluster.drain(0)
        await until(lambda: len(cluster.catalog.status()["models"]["law"]["workers"]) == 1)
        assert await answer(cluster, "law") == await answer(cluster, "echo") == "hello"


async def test_an_engine_that_offers_nothing_leaves_discovery_and_comes_back() -> None:
    async with Cluster.up(workers=1) as cluster:
        worker = cluster.worker(0)
        assert worker.card is not None
        worker._offer(())
        await until(lambda: ready(cluster) == [])
        assert not await worker.runtime.discovery.items(names.instances("dynamo"))
        worker._offer((worker.card,))
        await until(lambda: ready(cluster) == ["echo"])
        assert await answer(cluster, "echo") == "hello"
