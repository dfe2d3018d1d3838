"""To its frontends a global router is an engine like any other: it meets the same contract, with simulated pools behind it."""

from __future__ import annotations

import contextlib

import attrs
import pytest

from dynamo_core.config.schema import Use
from dynamo_core.contracts import EngineContract
from dynamo_core.testing.cluster import Cluster
from dynamo_global_router.engine import GlobalRouter
from dynamo_global_router.settings import PoolSettings


@pytest.mark.slow
class TestGlobalRouter(EngineContract):
    @pytest.fixture
    async def pools(self):
        async with contextlib.AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(Cluster.up(workers=0, engine=Use("sim", {"pace_ms": 0.5, "block_size": 16, "context_length": 2048})))
            for pool in ("one", "two"):
                await cluster.add(namespace=pool)
            yield cluster

    @pytest.fixture
    def engine_factory(self, pools):
        class InAStack(GlobalRouter):
            async def start(self, context):
                return await super().start(attrs.evolve(context, config=pools.config, plugins=pools.plugins))

        return lambda: InAStack(pools=(PoolSettings("one"), PoolSettings("two")))

    @pytest.fixture
    def prompt(self):
        return [1, 15, 27, 300, 301, 302]
