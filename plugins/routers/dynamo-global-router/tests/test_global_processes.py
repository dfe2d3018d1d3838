"""A frontend, global routers and pools of simulated workers, each a process of its own, asked through OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import attrs
import httpx
import openai
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.plugins import Plugins

pytestmark = pytest.mark.slow

PLANES = """
lease_ttl = 2
discovery = {{ use = "file", path = "{path}/discovery" }}
[frontend]
port = {port}
drain_timeout = 5
[migration]
wait = 2
"""
TWO_POOLS = PLANES + """
[[workers]]
name = "global"
drain_timeout = 5
[workers.engine]
use = "global-router"
pools = [
  {{ name = "fast", cost = 4.0, rates = {{ prefill_ms = 5, itl_ms = 2, learn = false }} }},
  {{ name = "slow", cost = 1.0, rates = {{ prefill_ms = 200, itl_ms = 30, learn = false }}, router = {{ use = "least-loaded" }} }},
]
[[workers]]
namespace = "fast"
engine = {{ use = "sim", pace_ms = 2 }}
max_requests = 4
drain_timeout = 5
[[workers]]
namespace = "slow"
count = 2
engine = {{ use = "sim", pace_ms = 10 }}
max_requests = 4
drain_timeout = 5
"""
TWO_ROLES = PLANES + """
[[workers]]
name = "global-prefill"
drain_timeout = 5
[workers.engine]
use = "global-router"
role = "prefill"
pools = [{{ name = "read-a" }}, {{ name = "read-b" }}]
strategy = {{ use = "grid", table = [["read-a"], ["read-b"]], input = {{ min = 0, max = 200, steps = 2 }}, ttft_ms = {{ min = 0, max = 1, steps = 1 }} }}
[[workers]]
name = "global-decode"
drain_timeout = 5
[workers.engine]
use = "global-router"
role = "decode"
pools = [{{ name = "write-a" }}, {{ name = "write-b" }}]
strategy = {{ use = "grid", table = [["write-a", "write-b"]], input = {{ min = 0, max = 1, steps = 1 }}, itl_ms = {{ min = 0, max = 100, steps = 2 }} }}
[[workers]]
namespace = "read-a"
engine = {{ use = "sim", role = "prefill", pace_ms = 2 }}
[[workers]]
namespace = "read-b"
engine = {{ use = "sim", role = "prefill", pace_ms = 2 }}
[[workers]]
namespace = "write-a"
engine = {{ use = "sim", role = "decode", pace_ms = 2 }}
[[workers]]
namespace = "write-b"
engine = {{ use = "sim", role = "decode", pace_ms = 2 }}
"""


@attrs.define
class Running:
    stack: LocalStack
    url: str
    client: openai.AsyncOpenAI

    async def ask(self, prompt: str = "the way to the sea", *, tokens: int = 8, **extension: Any) -> tuple[str, str]:
        """Text, and id of the request."""
        raw = await self.client.completions.with_raw_response.create(model="sim", prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"dynamo": extension})
        return raw.parse().choices[0].text, raw.headers["x-request-id"]

    async def story(self, id: str) -> list[dict[str, Any]]:
        """The record that `dynamo explain` prints, and what followed from it."""
        async with httpx.AsyncClient() as client:
            record = (await client.get(f"{self.url}/debug/decisions/{id}")).json()
        return record.get("further", [])

    async def pool(self, id: str) -> str:
        return (await self.story(id))[0]["served"]

    def signal(self, table: int, number: int) -> int:
        """To every process of one [[workers]] table. Those that a signal ends are started again after a while."""
        found = [child for child in self.stack.supervisor.children if child.name.startswith(f"backend-{table}.")]
        for child in found:
            assert child.process is not None
            os.kill(child.process.pid, number)
        return len(found)

    async def status(self, role: str) -> str:
        return (await self.stack.status_urls(role))[0]


@pytest.fixture
def running(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]):
    @contextlib.asynccontextmanager
    async def up(text: str) -> AsyncGenerator[Running]:
        path = tmp_path / "stack.toml"
        path.write_text(text.format(path=tmp_path, port=unused_tcp_port_factory()))
        plugins = Plugins.load()
        said: list[str] = []
        async with LocalStack.open(path, (), load(path, plugins=plugins), plugins, lambda name, line: said.append(f"{name} | {line}")) as stack:
            try:
                url = await stack.wait_ready(lambda _: None, 120.0)
                async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60.0) as client:
                    yield Running(stack, url, client)
            except BaseException:
                print("\n".join(said[-80:]))
                raise

    return up


async def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.1)


async def test_targets_choose_the_pool_and_a_pool_that_is_killed_is_avoided_until_it_is_back(running) -> None:
    async with running(TWO_POOLS) as up:
        expected, cheap = await up.ask()
        same, urgent = await up.ask(ttft_target_ms=50, itl_target_ms=10)
        assert same == expected
        assert [await up.pool(id) for id in (cheap, urgent)] == ["slow", "fast"]

        explained = await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "dynamo_core.cli", "explain", urgent, "--url", up.url],
                                            capture_output=True, text=True, timeout=60, check=True)
        assert "the cheapest of 1 that are expected to meet the targets" in explained.stdout
        assert "ITL 30.0 > 10 ms" in explained.stdout
        assert explained.stdout.count("decision   ") == 2, "that of the frontend, and that of the pool's own router"

        streamed = await up.client.completions.create(model="sim", prompt="the way to the sea", max_tokens=8, temperature=0, stream=True,
                                                      stream_options={"include_usage": True})
        chunks = [chunk async for chunk in streamed]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage.completion_tokens == 8

        # The store still lists the workers that are killed here: their lease has 2 s to go.
        assert up.signal(2, signal.SIGKILL) == 2
        outcomes: Counter[str] = Counter()
        for _ in range(10):
            text, id = await up.ask()
            assert text == expected
            outcomes[await up.pool(id)] += 1
        assert outcomes["fast"] >= 1, outcomes
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{await up.status('global')}/metrics")).text
        assert 'dynamo_global_router_decisions_total{kind="cheapest",pool="slow"}' in metrics
        assert 'dynamo_frontend_workers{model="sim",pool="fast",state="ready"} 1.0' in metrics
        assert "dynamo_component_requests_total" in metrics

        async def back() -> bool:
            return await up.pool((await up.ask())[1]) == "slow"

        await until(back)


async def test_a_client_is_told_to_come_back_when_every_pool_is_full_and_is_served_when_one_is_not(running) -> None:
    async with running(TWO_POOLS) as up:
        held = [await up.client.completions.create(model="sim", prompt=f"number {i}", max_tokens=20_000, stream=True) for i in range(12)]
        for stream in held:
            await anext(aiter(stream))
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as refusal:
                await up.client.completions.create(model="sim", prompt="one too many", max_tokens=5, stream=stream)
            assert refusal.value.status_code == 529
            assert refusal.value.body["code"] == "overloaded"
            assert "pool fast" in refusal.value.message
            assert "pool slow" in refusal.value.message
            id = refusal.value.response.headers["x-request-id"]
            assert (await up.story(id))[0]["served"] is None
        for stream in held:
            await stream.close()

        async def served() -> bool:
            with contextlib.suppress(openai.APIStatusError):
                return bool((await up.ask())[0])
            return False

        await until(served)


async def test_health_names_a_pool_that_is_gone_and_the_router_serves_on(running) -> None:
    async with running(TWO_POOLS) as up:
        url = await up.status("global")
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/health")).json().items() >= {"status": "ready", "role": "global", "problems": {}, "models": ["sim"]}.items()
            # Stopped, not killed: one that is started again may be back before the lease of the one before it ends.
            assert up.signal(1, signal.SIGSTOP) == 1
            health = {}

            async def said() -> bool:
                health.update((await client.get(f"{url}/health")).json())
                return "pool fast" in health["problems"]

            await until(said)
            assert health["status"] == "degraded"
            assert health["problems"]["pool fast"].startswith("gone: ")
            pools = (await client.post(f"{url}/control/pools", json={})).json()["pools"]
            assert {pool["name"] for pool in pools} == {"fast", "slow"}
        _, id = await up.ask(ttft_target_ms=50, itl_target_ms=10)
        assert await up.pool(id) == "slow"
        up.signal(1, signal.SIGCONT)


async def test_prefill_and_decode_pools_of_processes_serve_one_model(running) -> None:
    async with running(TWO_ROLES) as up:
        seen = Counter()
        expected: dict[str, str] = {}
        for words, target in (("go", 10), ("go", 90), ("sea river way " * 60, 10), ("sea river way " * 60, 90)):
            text, id = await up.ask(words, ttft_target_ms=1, itl_target_ms=target)
            assert expected.setdefault(words, text) == text, "the pool changes the time, not the answer"
            seen[await up.pool(id)] += 1
        assert seen == {"write-a": 2, "write-b": 2}
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{await up.status('global-prefill')}/metrics")).text
        for pool in ("read-a", "read-b"):
            assert f'dynamo_global_router_decisions_total{{kind="grid",pool="{pool}"}} 2.0' in metrics
