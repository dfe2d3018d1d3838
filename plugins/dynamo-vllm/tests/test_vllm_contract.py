"""The engine contract on the real vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import Running, start
from dynamo_core.engines import Engine


@pytest_asyncio.fixture(scope="module", loop_scope="module", name="shared")
async def start_once(make_engine: Callable[..., Any]) -> AsyncIterator[Running]:
    running = await start(make_engine())
    yield running
    await running.engine.stop()


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
class TestTinyModel(EngineContract):
    reports_load = True
    patience = 120.0
    max_tokens = 16

    @pytest.fixture
    def engine_factory(self, make_engine: Callable[..., Any]) -> Callable[[], Engine]:
        return make_engine

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        return [300, 17, 402, 99, 5, 611, 350]

    @pytest.fixture
    def running(self, shared: Running) -> Running:
        return shared
