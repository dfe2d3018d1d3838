"""Steady load on a real stack of processes, and faults while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import attrs
import httpx
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.plugins import Plugins

STACK = """
[discovery]
use = "file"
path = "{path}"

[frontend]
port = {port}
processes = {frontends}
drain_timeout = 10
{frontend}

[migration]
limit = 3
wait = 15

[router]
use = "least-loaded"

[[workers]]
count = {workers}
engine = {{ use = "sim", pace_ms = 10 }}
drain_timeout = 5
{worker}
"""


@attrs.define
class Load:
    """Streams one after the other on each of `streams` lanes; every answer is compared with the answer of an undisturbed fleet."""

    url: str
    streams: int
    tokens: int
    expected: dict[str, str] = attrs.field(factory=dict)
    done: int = 0
    failures: Counter[str] = attrs.field(factory=Counter)
    running: bool = True

    async def ask(self, client: httpx.AsyncClient, prompt: str, begun: Callable[[], object] = lambda: None) -> tuple[str, int]:
        """The text and the number of tokens; -1 and what was wrong. :param begun: called with each part of the text."""
        body = {"model": "sim", "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        text, tokens = "", -1
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                return f"HTTP {response.status_code}: {(await response.aread()).decode()}", -1
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error event: {event['error']['message']}", -1
                    text += "".join(choice["text"] for choice in event["choices"])
                    begun()
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return text, tokens

    async def learn(self, prompts: int) -> None:
        """Ask each prompt once while nothing is wrong."""
        async with httpx.AsyncClient(timeout=60.0) as client:
            for i in range(prompts):
                prompt = f"prompt number {i} about many things"
                self.expected[prompt], tokens = await self.ask(client, prompt)
                assert tokens == self.tokens, self.expected[prompt]

    async def lane(self, number: int) -> None:
        rng = random.Random(number)
        while self.running:
            prompt = rng.choice(list(self.expected))
            try:
                # A connection of its own for each request: lanes spread over the frontend processes.
                async with httpx.AsyncClient(timeout=60.0) as client:
                    text, tokens = await self.ask(client, prompt)
            except httpx.HTTPError as e:
                self.failures[f"{type(e).__name__}: {e}"] += 1
                continue
            self.check(prompt, text, tokens)

    def check(self, prompt: str, text: str, tokens: int) -> None:
        if text != self.expected[prompt]:
            self.failures["wrong text" if tokens >= 0 else text] += 1
        elif tokens != self.tokens:
            self.failures[f"usage says {tokens} tokens"] += 1
        else:
            self.done += 1

    async def once(self, fault: Callable[[], None]) -> None:
        """One request on each lane, and the fault while all of them are being answered."""
        begun = [asyncio.Event() for _ in range(self.streams)]

        async def one(number: int) -> None:
            prompt = list(self.expected)[number % len(self.expected)]
            async with httpx.AsyncClient(timeout=60.0) as client:
                self.check(prompt, *await self.ask(client, prompt, begun[number].set))

        async with asyncio.TaskGroup() as lanes:
            for number in range(self.streams):
                lanes.create_task(one(number))
            async with asyncio.timeout(60):
                for each in begun:
                    await each.wait()
            fault()

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncGenerator[Load]:
        lanes = [asyncio.create_task(self.lane(i)) for i in range(self.streams)]
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


@attrs.define
class Field:
    """A stack under test."""

    stack: LocalStack
    url: str
    said: list[str]

    def children(self, name: str):
        return [child for child in self.stack.supervisor.children if child.name.startswith(name)]


@pytest.fixture
def load_class() -> type[Load]:
    return Load


@pytest.fixture
def field(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]):
    """`async with field(workers=4, frontends=2) as running:` starts a stack and waits until it is ready."""

    @contextlib.asynccontextmanager
    async def up(*, workers: int, frontends: int, worker: str = "", frontend: str = "") -> AsyncGenerator[Field]:
        path = tmp_path / "stack.toml"
        path.write_text(STACK.format(path=tmp_path / "discovery", port=unused_tcp_port_factory(), workers=workers, frontends=frontends, worker=worker, frontend=frontend))
        plugins = Plugins.load()
        config = load(path, plugins=plugins)
        said: list[str] = []
        async with LocalStack.open(path, (), config, plugins, lambda name, line: said.append(f"{name} | {line}")) as stack:
            try:
                url = await stack.wait_ready(lambda _: None, 120.0)
            except BaseException:
                print("\n".join(said[-60:]))
                raise
            yield Field(stack, url, said)

    return up
