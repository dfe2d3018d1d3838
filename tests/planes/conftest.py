"""Stacks of real processes over any store and any planes, and load on them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.plugins import Plugins

_numbers = itertools.count()


def toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


@attrs.define
class Running:
    """A stack under test."""

    stack: LocalStack
    url: str
    said: list[str]

    def children(self, name: str):
        return [child for child in self.stack.supervisor.children if child.name.startswith(name)]

    async def health(self) -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=10.0) as client:
            return (await client.get(f"{self.url}/health")).json()

    async def until(self, condition: Callable[[dict[str, Any]], bool], timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the frontend's health is like that."""
        end = time.monotonic() + timeout
        while True:
            health = await self.health()
            if condition(health):
                return health
            assert time.monotonic() < end, health
            await asyncio.sleep(0.1)


def proven(health: Mapping[str, Any]) -> int:
    return sum(bool(worker.get("proven")) for model in health.get("models", {}).values() for worker in model.get("workers", ()))


@attrs.define
class Load:
    """Streams on several lanes, one after the other; every answer is compared with the first answer to the same prompt."""

    url: str
    lanes: int = 6
    tokens: int = 40
    done: int = 0
    failures: Counter[str] = attrs.field(factory=Counter)
    expected: dict[str, str] = attrs.field(factory=dict)
    running: bool = True

    async def ask(self, client: httpx.AsyncClient, prompt: str) -> str:
        body = {"model": "sim", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        text = ""
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    text += "".join(choice["text"] for choice in event["choices"])
        return text

    async def _lane(self, number: int) -> None:
        prompts = itertools.cycle([f"prompt {number} {i}" for i in range(3)])
        while self.running:
            prompt = next(prompts)
            try:
                async with httpx.AsyncClient(timeout=90.0) as client:
                    text = await self.ask(client, prompt)
            except (httpx.HTTPError, ValueError) as e:
                self.failures[f"{type(e).__name__}: {e}"] += 1
                await asyncio.sleep(0.1)
                continue
            if text != self.expected.setdefault(prompt, text):
                self.failures[f"another text: {text!r}"] += 1
            else:
                self.done += 1

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncGenerator[Load]:
        lanes = [asyncio.create_task(self._lane(i)) for i in range(self.lanes)]
        try:
            yield self
        finally:
            self.running = False
            await asyncio.gather(*lanes)

    async def until_done(self, more: int, timeout: float = 60.0) -> None:
        """Let this many more answers come in."""
        wanted, end = self.done + more, time.monotonic() + timeout
        while self.done < wanted:
            assert time.monotonic() < end, f"only {self.done} answers; failures: {dict(self.failures)}"
            await asyncio.sleep(0.05)


@pytest.fixture
def load_on() -> type[Load]:
    return Load


@pytest.fixture(scope="session")
def etcd(etcd_server):
    return etcd_server()


@pytest.fixture(scope="session")
def nats(nats_server):
    return nats_server()


@pytest.fixture
def stack(tmp_path: Path):
    """`async with stack(discovery, request_plane, event_plane) as running:`; each of them a mapping with `use`."""

    @contextlib.asynccontextmanager
    async def up(discovery: Mapping[str, Any], request_plane: Mapping[str, Any], event_plane: Mapping[str, Any], *, workers: int = 2,
                 lease_ttl: float = 10.0) -> AsyncGenerator[Running]:
        path = tmp_path / f"stack-{next(_numbers)}.toml"
        path.write_text("\n".join([
            f"lease_ttl = {lease_ttl}", f"discovery = {toml(discovery)}", f"request_plane = {toml(request_plane)}", f"event_plane = {toml(event_plane)}",
            "[frontend]", "port = 0", "drain_timeout = 5", "[router]", 'use = "least-loaded"',
            "[[workers]]", f"count = {workers}", 'engine = { use = "sim", pace_ms = 5 }', "drain_timeout = 3",
        ]) + "\n")
        plugins = Plugins.load()
        config = load(path, plugins=plugins)
        said: list[str] = []
        async with LocalStack.open(path, (), config, plugins, lambda name, line: said.append(f"{name} | {line}")) as running:
            try:
                yield Running(running, await running.wait_ready(lambda _: None, 120.0), said)
            except BaseException:
                print("\n".join(said[-80:]))
                raise

    return up
