"""The engine `openai`: the contract of `dynamo_core.engines` on a server that runs already."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from urllib.parse import urlsplit

import attrs
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.config import Secret
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError, EngineDead, Problem
from dynamo_core.types import Output, Request
from dynamo_openai.meeting import Options, meet
from dynamo_openai.running import Running

_HEARTBEAT = 2.0
_ZMQ = re.compile(r"tcp://[^\s/*]+:\d{1,5}|ipc://.+")


def _is_url(engine: OpenAIEngine, attribute: object, value: str) -> None:
    parts = urlsplit(value)
    try:
        reached = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not (parts.query or parts.username)
    except ValueError:
        reached = False  # its port is none
    if not reached:
        raise ValueError(f"'url' must be the address of a server, such as http://gpu1:8000: {value!r}")


def _is_zmq(engine: OpenAIEngine, attribute: attrs.Attribute[str | None], value: str | None) -> None:
    if value is not None and not _ZMQ.fullmatch(value.replace("{rank}", "0")) and not (attribute.name == "kv_events" and value == "off"):
        raise ValueError(f"'{attribute.name}' must be an address to call, such as tcp://gpu1:5557: {value!r}")
    if attribute.name == "kv_replay" and value is not None and engine.kv_events in (None, "off"):
        raise ValueError("'kv_replay' is of no use without 'kv_events'")


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


@attrs.define(eq=False)
class OpenAIEngine:
    """A plain OpenAI-compatible server that returns token ids, first of all `vllm serve`."""

    url: str = attrs.field(validator=_is_url, converter=_base)
    """Of the server: http://gpu1:8000."""
    model: str | None = None
    """Which of its models, by the name that the server has for it. Default: the only one."""
    tokenizer: str | None = None
    """A folder with tokenizer.json and what goes with it, or a Hugging Face id. Default: where the server says that its model is."""
    api_key: Secret | None = attrs.field(default=None, repr=False)
    """What the server was started with (--api-key)."""
    kv_events: str | None = attrs.field(default=None, validator=_is_zmq)
    """Where the server publishes KV events: tcp://gpu1:5557. That is of rank 0; rank r is on port + r, or at its number in place of {rank}.
    Default: where the server says. "off": nowhere."""
    kv_replay: str | None = attrs.field(default=None, validator=_is_zmq)
    """Where it replays those that were lost. Without it, each loss empties what routers know of the cache."""
    block_size: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))
    """Tokens in a block of its KV cache. Default: what its metrics say."""
    total_blocks: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))
    """Blocks in the KV cache of one rank. Default: what its metrics say."""
    dp_size: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))
    """Data-parallel ranks of the server. Default: what its metrics say."""
    context_length: int | None = attrs.field(default=None, validator=v.optional(v.ge(2)))
    """Prompt plus output, in tokens. Default: what the server says."""
    connect_timeout: float = attrs.field(default=5.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which a connection that is not made counts as refused."""
    poll_interval: float = attrs.field(default=1.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds between two looks at the server: is it there, how busy is it, which adapters does it have?"""
    _running: Running | None = attrs.field(default=None, init=False, repr=False)

    async def start(self, context: EngineContext) -> ModelCard:
        if context.role not in (None, "aggregated"):
            raise ConfigError(Problem(f"role = {context.role!r}: {self.url} cannot hand KV blocks over, or take them",
                                      remedy="leave `role` out; for prefill and decode workers there is the engine `vllm`"))  # fmt: skip
        progress = _Progress(context)
        beating = asyncio.create_task(progress.beat(), name=f"wait for {self.url}")
        try:
            met = await meet(self._options(), context, progress.phase)
        finally:
            beating.cancel()
        self._running = running = Running(met, context)
        await running.look()
        running.watch(self.poll_interval)
        context.progress("ready", 1.0)
        return running.card

    def _options(self) -> Options:
        return Options(self.url, self.model, self.tokenizer, self.api_key, self.kv_events, self.kv_replay, self.block_size, self.total_blocks, self.dp_size,
                       self.context_length, self.connect_timeout)  # fmt: skip

    def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        return _nobody(self.url) if self._running is None else self._running.generate(request, context)

    def artifact(self, digest: str) -> bytes:
        running = self._running
        if running is None or running.card.tokenizer is None or digest != running.card.tokenizer.digest:
            raise KeyError(digest)
        return running.tokenizer

    async def probe(self) -> None:
        """One token of real work on each rank, in a cache of its own."""
        if self._running is None:
            raise EngineDead(f"the engine for {self.url} is not running")
        await self._running.probe()

    def problems(self) -> Mapping[str, str]:
        return {} if self._running is None else self._running.problems()

    async def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()


async def _nobody(url: str) -> AsyncGenerator[Output, None]:
    raise EngineDead(f"the engine for {url} is not running")
    yield  # raises when it is read, as every stream does


class _Progress:
    """Repeats the phase of a start that takes long."""

    def __init__(self, context: EngineContext) -> None:
        self._report: Callable[[str, float | None], None] = context.progress
        self._phase = "start"

    def phase(self, phase: str) -> None:
        self._phase = phase
        self._report(phase, None)

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT)
            self._report(self._phase, None)
