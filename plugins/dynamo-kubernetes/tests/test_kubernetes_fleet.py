"""A fleet of real processes that meets in a real API server, and what becomes of its requests when that, or a worker, is killed."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.ending import ended
from dynamo_core.plugins import Plugins

pytestmark = pytest.mark.slow


async def test_no_request_fails_while_the_api_server_is_gone_or_a_worker_is_killed(api_server, kube, tmp_path) -> None:
    path, plugins = tmp_path / "stack.yaml", Plugins.load()
    path.write_text(json.dumps({  # which is YAML
        "lease_ttl": 4.0,
        "discovery": {"use": "kubernetes", "kubeconfig": str(api_server.kubeconfig(namespace=kube.namespace)), "pod": "", "timeout": 3.0},
        "frontend": {"port": 0, "drain_timeout": 5},
        "router": {"use": "round-robin"},
        "workers": [{"count": 2, "engine": {"use": "echo"}, "drain_timeout": 3}],
    }))
    said: list[str] = []
    answers: list[int] = []
    async with LocalStack.open(path, (), load(path, plugins=plugins), plugins, lambda name, line: said.append(f"{name} | {line}")) as stack:
        url = await stack.wait_ready(lambda _: None, 90.0)
        async with httpx.AsyncClient(base_url=url, timeout=60.0) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]

            async def ask() -> None:
                while True:
                    answer = await client.post("/v1/completions", json={"model": model, "prompt": "one two three", "max_tokens": 3})
                    answers.append(answer.status_code)
                    await asyncio.sleep(0.02)

            async def workers() -> set[str]:
                return {worker["id"] for found in (await client.get("/health")).json()["models"].values() for worker in found["workers"]}

            async def until(condition) -> None:
                async with asyncio.timeout(60):
                    while not await condition():
                        await asyncio.sleep(0.1)

            async def lost() -> bool:
                return "discovery" in (await client.get("/health")).json()["problems"]

            async def both() -> bool:
                return len(await workers()) == 2

            async def a_successor() -> bool:
                return len(before - await workers()) == 1 and await both()

            await until(both)
            before = await workers()
            asking = asyncio.create_task(ask())
            try:
                api_server.kill()
                await until(lost)
                await asyncio.sleep(5.0)  # longer than any lease
                assert await workers() == before
                await asyncio.to_thread(api_server.start)
                await asyncio.sleep(5.0)
                assert await workers() == before
                assert not await lost()
                victim = next(child for child in stack.supervisor.children if child.name.startswith("backend"))
                assert victim.process is not None
                victim.process.kill()
                await until(a_successor)
            finally:
                await ended(asking)
    assert len(answers) > 100
    assert set(answers) == {200}, said[-50:]
