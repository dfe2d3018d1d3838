"""The engine contract through a server: one in this process, and the real vLLM."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.contracts.engine import EngineContract
from dynamo_core.contracts.engine_answers import Running, start
from dynamo_core.engines import Engine
from dynamo_core.testing.servers import free_port


@pytest.mark.asyncio(loop_scope="module")
class TestInThisProcess(EngineContract):
    reports_load = True

    @pytest.fixture(scope="module")
    @classmethod
    def server(cls, wire: Any) -> Iterator[Any]:
        with wire.apart(step=0.004, kv=(free_port(), free_port())) as server:
            yield server

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    @classmethod
    async def running(cls, server: Any, make_engine: Callable[..., Any]) -> AsyncIterator[Running]:
        running = await start(make_engine(server, poll_interval=0.02))
        yield running
        await running.engine.stop()

    @pytest.fixture
    def engine_factory(self, server: Any, make_engine: Callable[..., Any]) -> Callable[[], Engine]:
        return lambda: make_engine(server, poll_interval=0.02)

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        return [72, 101, 108, 108, 111, 33]


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="module")
class TestVllm(EngineContract):
    reports_load = True
    patience = 120.0
    max_tokens = 16

    @pytest_asyncio.fixture(scope="module", loop_scope="module")
    @classmethod
    async def running(cls, vllm_servers: Any) -> AsyncIterator[Running]:
        running = await start(vllm_servers.engine(0))
        yield running
        await running.engine.stop()

    @pytest.fixture
    def engine_factory(self, vllm_servers: Any) -> Callable[[], Engine]:
        return lambda: vllm_servers.engine(0)

    @pytest.fixture
    def prompt(self) -> Sequence[int]:
        return [300, 17, 402, 99, 5, 611, 350]
