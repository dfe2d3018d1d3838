"""Wrappers around every request: they see, refuse and change."""

from __future__ import annotations

import sys
import types
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
import msgspec
import pytest

from dynamo_core.config.schema import Use
from dynamo_core.context import Context
from dynamo_core.errors import RequestError
from dynamo_core.plugins import Plugins
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Delta, Request

LOG: list[Any] = []


@attrs.frozen
class Audit:
    tag: str = "audit"

    async def around_request(self, request: Request, context: Context, next: Any) -> AsyncIterator[Sequence[Delta]]:
        LOG.append((self.tag, "begin", request.stops.max_tokens))
        tokens = 0
        try:
            async for deltas in next(request):
                tokens += sum(len(delta.token_ids) for delta in deltas)
                yield deltas
        finally:
            LOG.append((self.tag, "end", tokens))


@attrs.frozen
class Guard:
    limit: int = 4

    async def around_request(self, request: Request, context: Context, next: Any) -> AsyncIterator[Sequence[Delta]]:
        if 33 in request.token_ids:
            raise RequestError("no shouting here", param="prompt")
        stops = msgspec.structs.replace(request.stops, max_tokens=min(self.limit, request.stops.max_tokens or self.limit))
        async for deltas in next(msgspec.structs.replace(request, stops=stops)):
            for delta in deltas:
                delta.text = delta.text.upper()
            yield deltas


@pytest.fixture
def plugins() -> Plugins:
    module = types.ModuleType("acme_around")
    module.Audit, module.Guard = Audit, Guard  # type: ignore[attr-defined]
    sys.modules["acme_around"] = module
    plugins = Plugins.load()
    from dynamo_core.plugins import Component, Plugin

    components = dict(plugins.components)
    for name, target in (("audit", "Audit"), ("guard", "Guard")):
        components["preprocessor", name] = Component("preprocessor", name, f"acme_around:{target}", Plugin("acme"))
    plugins.components = components
    LOG.clear()
    return plugins


async def test_wrappers_nest_in_the_order_of_the_configuration(plugins: Plugins) -> None:
    around = (Use("audit", {"tag": "outer"}), Use("guard", {"limit": 4}), Use("audit", {"tag": "inner"}))
    async with Cluster.up(workers=1, plugins=plugins, around=around) as cluster:
        generation = await cluster.generate("hello", max_tokens=100)
        assert await read_all(generation) == ("HELL", [104, 101, 108, 108], "length")
        assert generation.usage.completion_tokens == 4
        assert len(generation.decisions) == len(generation.workers) == 1
    assert LOG == [("outer", "begin", 100), ("inner", "begin", 4), ("inner", "end", 4), ("outer", "end", 4)]


async def test_a_wrapper_that_refuses_costs_no_worker_anything(plugins: Plugins) -> None:
    async with Cluster.up(workers=1, plugins=plugins, around=(Use("guard"),)) as cluster:
        with pytest.raises(RequestError, match="no shouting"):
            await read_all(await cluster.generate("hey!", max_tokens=10))
        assert cluster.worker(0).admission.in_flight == 0


async def test_cancelling_runs_the_end_of_every_wrapper_and_frees_the_worker(plugins: Plugins) -> None:
    import asyncio

    async with Cluster.up(workers=1, plugins=plugins, around=(Use("audit"),), options={"delay": 0.005}) as cluster:
        context = Context("leaving")
        generation = await cluster.generate("a" * 50, max_tokens=1000, context=context)
        await generation.read()
        context.cancel("gone")
        generation.cancel("gone")
        async with asyncio.timeout(10):
            while cluster.worker(0).admission.in_flight or len(LOG) < 2:
                await asyncio.sleep(0.01)
        assert LOG[1][:2] == ("audit", "end")
