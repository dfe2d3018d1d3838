"""What every engine must do, and what it may do besides.

    G1  `start` returns when the engine can generate; it reports progress at least every ten seconds until then.
    G2  `generate` yields only new tokens, in order; the last output of each choice carries a finish reason.
    G3  Closing the iterator stops the work within one step and frees what it held. That is the only way to abort.
    G4  `max_tokens`, `min_tokens`, stop token ids, end of sequence and `ignore_eos` are obeyed exactly.
    G5  A prompt that does not fit is a `RequestError`, not a hang, and the next request is served.
    G6  With temperature 0, the same request gives the same tokens, alone or in a crowd; and the first k generated
        tokens, appended to the prompt (`resumed`), are continued as if nothing had happened.
    G7  Requests do not disturb each other: one that fails, is cancelled or is slow changes no other output.
    G8  `stop` ends every stream with `EngineDead` or its proper end and releases what the engine holds.
    G9  What the card promises in `capabilities` works; what it does not promise is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Config
from dynamo_core.context import Context
from dynamo_core.plugins import Plugins
from dynamo_core.types import Load, Output, Request


class BlocksStored(msgspec.Struct, frozen=True):
    """KV blocks that the engine can now reuse, one chain: block i+1 follows block i."""

    hashes: Sequence[int | bytes]
    """The engine's own: 64-bit numbers, signed or not; of longer ones and of bytes, the last 64 bits count. `array("Q")` is fastest."""
    parent: int | bytes | None
    """Hash of the block before the first; `None` at the start of a prompt."""
    token_ids: Sequence[int]
    """All tokens of the blocks, `len(hashes) * block_size` of them. A list or `array("Q")` is fastest."""
    tier: str = "device"
    """`device`, `host`, `disk` or `external`."""
    adapter: str | None = None
    cache_salt: str | None = None
    media: Sequence[Sequence[int | str | bytes]] = ()
    """For each block, digests of the media that reach into it. They must be those that requests carry (`Request.media`, key `digest`)."""
    block_size: int | None = None
    """Tokens of a block by the engine's own word, where it gives one; the card must agree."""


class BlocksRemoved(msgspec.Struct, frozen=True):
    hashes: Sequence[int | bytes]
    tier: str = "device"


class BlocksCleared(msgspec.Struct, frozen=True):
    """The whole cache is gone."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


@attrs.define
class EngineContext:
    """What the worker hands to its engine at start. The callbacks may be called from any thread, and never block."""

    progress: Callable[[str, float | None], None] = lambda phase, fraction: None
    """`progress("load", 0.4)`: phase and, where known, how far (0 to 1)."""
    kv_events: Callable[[Sequence[KvEvent], int], None] = lambda events, dp_rank: None
    """Publish what one step stored and removed, in order."""
    load: Callable[[Load], None] = lambda load: None
    """Publish how busy the engine is; at most ten times a second."""
    died: Callable[[str], None] = lambda reason: None
    """The engine cannot go on: streams end with `EngineDead`, and its worker leaves discovery and ends. A process of its own exits with an error."""
    offer: Callable[[Sequence[ModelCard]], None] = lambda cards: None
    """What the engine serves from now on, instead of the card that `start` returned alone: that card and one for each adapter, or nothing while
    it sleeps. Cards of adapters have `adapter` set."""
    cache_dir: Path = attrs.field(factory=lambda: Path.home() / ".cache" / "dynamo")
    """For downloads and conversions that outlive the process."""
    name: str = "worker"
    """For log lines and metrics labels."""
    role: str | None = None
    """What the operator wants the worker to be (`workers.role`), instead of what its card says; `None`: that is the engine's to say."""
    config: Config | None = None
    """What the process runs with, for engines that are clients of other fleets. Without a worker around it, an engine has none."""
    plugins: Plugins | None = None
    """What is installed, for the same."""


@runtime_checkable
class Engine(Protocol):
    """One engine instance. Its options are the fields of the attrs class that implements it."""

    async def start(self, context: EngineContext) -> ModelCard: ...

    def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        """:raises RequestError: this request cannot be served. :raises EngineDead: no request can."""
        ...

    async def stop(self) -> None: ...


# ------------------------------------------------------------------ optional capabilities


@runtime_checkable
class HasArtifacts(Protocol):
    def artifact(self, digest: str) -> bytes:
        """Content of an artifact that the card names. :raises KeyError: unknown digest."""
        ...


@runtime_checkable
class Probes(Protocol):
    async def probe(self) -> None:
        """Prove by cheap real work that the engine is alive, within a few seconds, without touching user caches.

        Engines without it are probed with a one-token request. :raises EngineDead: it is not.
        """
        ...


@runtime_checkable
class Drains(Protocol):
    async def drain(self) -> None:
        """Wait for work that streams do not show, such as KV blocks that a peer has yet to fetch."""
        ...


@runtime_checkable
class HasMetrics(Protocol):
    def metrics(self) -> bytes:
        """The engine's own series in Prometheus' text format; the worker exports them beside its own."""
        ...


@runtime_checkable
class Reports(Protocol):
    def problems(self) -> Mapping[str, str]:
        """Degraded states by name, for `/health`: requests are served all the same. Cached state, no I/O."""
        ...


@runtime_checkable
class Checks(Protocol):
    def check(self, config: Config, plugins: Plugins) -> None:
        """What `dynamo check` should find besides wrong options: contradictions, missing parts. Starts nothing. :raises ConfigError: says all of it."""
        ...


@runtime_checkable
class Controls(Protocol):
    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        """Named async functions for operators: `sleep`, `wake`, `reset_cache`, `load_adapter`, `profile`, ...

        Each takes and returns a JSON object; the worker serves them on its status port and its control endpoint.
        An engine that decides where a request goes has `explain`: it takes `{"id": request id}` and returns `{"decisions": [record, ...]}`, each record
        with `id` and `text`. With `explain` among the capabilities of its card, frontends ask it when somebody asks them.
        """
        ...
