"""What can be checked without vLLM: options, load reports, missing vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError
from dynamo_core.types import Load
from dynamo_vllm.engine import VllmEngine
from dynamo_vllm.load import LoadReports


def test_arguments_that_the_plugin_sets_itself_are_refused_with_what_to_use_instead() -> None:
    with pytest.raises(ValueError, match="'args' must not have 'kv_events_config': use 'kv_events'"):
        VllmEngine(model="m", args={"kv_events_config": {}})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
async def test_a_missing_vllm_is_said_with_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match="vLLM is not installed"):
        await VllmEngine(model="m").start(EngineContext())


def stats(running: int) -> Any:
    return SimpleNamespace(num_running_reqs=running, num_waiting_reqs=0, num_skipped_waiting_reqs=0, kv_cache_usage=running / 10)


async def test_a_burst_shorter_than_the_interval_is_reported_and_so_is_its_end() -> None:
    loads: list[Load] = []
    reports = LoadReports(loads.append)
    reports.total_blocks = 100
    reports.record(0, stats(0))
    async with asyncio.timeout(10):
        while not loads:
            await asyncio.sleep(0.001)
    for running in (1, 2, 3, 0):
        reports.record(0, stats(running))
    async with asyncio.timeout(10):
        while len(loads) < 3:
            await asyncio.sleep(0.01)
    reports.close()
    assert [load.running for load in loads] == [0, 3, 0]
    assert loads[1].kv_used_blocks == 30
