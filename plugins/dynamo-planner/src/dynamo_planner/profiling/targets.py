"""What is measured: a worker, through the request plane of its fleet, or whatever answers OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import attrs
import httpx
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Config
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.errors import Cancelled, Unavailable
from dynamo_core.httpx_client import HttpClient
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.fleet import FleetWatch
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance, Output, Request, Sampling, Stops

_IDS = (100, 1000)
"""Token ids of prompts: plain pieces of text in any vocabulary, and no special tokens."""


@attrs.frozen
class Timeline:
    """When the tokens of one answer came."""

    asked: float
    arrivals: Sequence[tuple[float, int]]
    """Time and number of tokens, in order."""

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]


class Target(Protocol):
    """Answers prompts of so many tokens, none of which it has seen before."""

    name: str
    engine: str
    max_sequences: int | None
    kv_tokens: int | None

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Timeline:
        """:raises DynamoError: it does not answer as it should."""
        ...


def fresh_prompt(tokens: int, chance: random.Random) -> list[int]:
    """Ids that no cache holds."""
    return [chance.randrange(*_IDS) for _ in range(tokens)]


# ------------------------------------------------------------------ a worker


@attrs.define(eq=False)
class WorkerTarget:
    runtime: Runtime
    instance: Instance
    card: ModelCard
    name: str = attrs.field(init=False)
    engine: str = attrs.field(init=False)
    max_sequences: int | None = attrs.field(init=False)
    kv_tokens: int | None = attrs.field(init=False)
    _chance: random.Random = attrs.field(init=False, factory=random.Random)
    _count: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self.name, self.engine, self.max_sequences = self.card.name, self.card.engine, self.card.max_sequences
        self.kv_tokens = self.card.total_blocks * self.card.block_size if self.card.total_blocks else None

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Timeline:
        self._count += 1
        request = Request(
            id=f"profile-{self.instance.id:x}-{self._count}", model=self.card.name, token_ids=fresh_prompt(prompt_tokens, self._chance),
            sampling=Sampling(temperature=0.0), stops=Stops(max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True),
        )
        asked = time.perf_counter()
        stream = await self.runtime.channels.open(self.instance.address, f"{self.instance.path}", msgspec.msgpack.encode(request), Context(request.id))
        arrivals: list[tuple[float, int]] = []
        try:
            while batch := await stream.read():
                tokens = sum(len(output.token_ids) for output in batch if isinstance(output, Output))
                if tokens:
                    arrivals.append((time.perf_counter(), tokens))
        except (asyncio.CancelledError, Cancelled):
            stream.cancel()
            raise
        return _complete(Timeline(asked, arrivals), self.instance.label)


@contextlib.asynccontextmanager
async def worker_target(config: Config, plugins: Plugins, model: str | None, wait: float) -> AsyncGenerator[WorkerTarget]:
    """The first worker of the fleet that serves `model`, or any. :raises Unavailable: there is none within `wait` seconds."""
    async with Runtime.open(config, plugins) as runtime:
        found: asyncio.Queue[tuple[Instance, ModelCard]] = asyncio.Queue()

        def joined(instance: Instance, card: ModelCard) -> None:
            if instance.endpoint == names.GENERATE and card.role in ("aggregated", "decode") and model in (None, card.name):
                found.put_nowait((instance, card))

        watching = asyncio.create_task(FleetWatch(runtime, joined, lambda instance: None).run(), name="profile: watch workers")
        try:
            try:
                async with asyncio.timeout(wait):
                    instance, card = await found.get()
            except TimeoutError:
                raise Unavailable(f"no worker{f' of {model}' if model else ''} is in the fleet {config.namespace!r}; start one: dynamo worker FILE") from None
            yield WorkerTarget(runtime, instance, card)
        finally:
            await ended(watching)


# ------------------------------------------------------------------ a URL


@attrs.define(eq=False)
class UrlTarget:
    client: httpx.AsyncClient
    name: str
    engine: str = ""
    max_sequences: int | None = None
    kv_tokens: int | None = None
    _chance: random.Random = attrs.field(init=False, factory=random.Random)

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Timeline:
        body = {
            "model": self.name, "prompt": fresh_prompt(prompt_tokens, self._chance), "max_tokens": output_tokens, "min_tokens": output_tokens,
            "ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }
        asked, times, tokens = time.perf_counter(), list[float](), 0
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise Unavailable(f"{self.client.base_url} answers {answer.status_code}: {(await answer.aread())[:300].decode('utf-8', 'replace')}")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event: Any = msgspec.json.decode(line[6:])
                    if event.get("usage"):
                        tokens = event["usage"]["completion_tokens"]
                    if event.get("choices"):
                        times.append(time.perf_counter())
        except httpx.HTTPError as e:
            raise Unavailable(f"{self.client.base_url} does not answer: {e or type(e).__name__}") from e
        each, more = divmod(max(tokens, len(times)), max(1, len(times)))  # how tokens were spread over events is not said
        return _complete(Timeline(asked, [(at, each + (i < more)) for i, at in enumerate(times)]), str(self.client.base_url))


@contextlib.asynccontextmanager
async def url_target(url: str, model: str | None, key: str | None, timeout: float = 600.0) -> AsyncGenerator[UrlTarget]:
    """:raises Unavailable: nobody answers, or it serves several models and none was named."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None)
    async with HttpClient(base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False) as client:
        try:
            answer = await client.get("/v1/models")
            served = [entry["id"] for entry in answer.json()["data"]] if answer.status_code == 200 else []
        except (httpx.HTTPError, ValueError, KeyError) as e:
            raise Unavailable(f"{url} does not list its models: {e or type(e).__name__}") from e
        if model is None and len(served) != 1:
            raise Unavailable(f"{url} serves {', '.join(served) or 'no model'}; choose one with --model")
        yield UrlTarget(client, model or served[0])


def _complete(timeline: Timeline, who: str) -> Timeline:
    if not timeline.arrivals:
        raise Unavailable(f"{who} answered without a token")
    return timeline
