"""The engine `vllm`: the contract of `dynamo_core.engines` on vLLM's `AsyncLLM`."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError, EngineDead, EngineFailed, Problem
from dynamo_core.kv.feed import KvFeed
from dynamo_core.types import Output, Request
from dynamo_vllm import card, vllm_api, vllm_nodes
from dynamo_vllm.fetching import Fetches
from dynamo_vllm.headless import Headless
from dynamo_vllm.images import MEDIA
from dynamo_vllm.launch import launched
from dynamo_vllm.load import LoadReports
from dynamo_vllm.nodes import OtherNodes, Place
from dynamo_vllm.running import Running
from dynamo_vllm.vllm_api import Vllm

log = logging.getLogger(__name__)

_OURS = {
    "model": "'model'", "kv_events_config": "'kv_events'", "kv_transfer_config": "'role' and 'transfer'", "ec_transfer_config": "'role' and 'encoders'",
    "served_model_name": "'served_name' of the worker",
}
"""Arguments of vLLM that this plugin sets itself, and what to use instead."""


_NO_PLACE = ConfigError(Problem("a headless node is a part of an engine on several nodes, and 'args' do not say which part",
                                remedy="data_parallel_size, data_parallel_size_local, data_parallel_start_rank, data_parallel_address and "
                                       "data_parallel_rpc_port, as for vllm serve --headless; or nnodes, node_rank and master_addr"))  # fmt: skip


_NO_WAY = ConfigError(Problem("an encode worker does not know how what it makes of images reaches those who read prompts",
                              remedy='encoders = { ec_connector = "ECExampleConnector", ec_connector_extra_config = { shared_storage_path = "/shared" } }, '
                                     "here and there, or another connector of vLLM's"))  # fmt: skip


def _not_ours(engine: VllmEngine, attribute: object, value: Mapping[str, Any]) -> None:
    for name, instead in _OURS.items():
        if name in value:
            raise ValueError(f"'args' must not have {name!r}: use {instead}")


@attrs.define(eq=False)
class VllmEngine:
    """vLLM in the worker process: any model that vLLM serves, on GPU or CPU."""

    model: str
    """A directory with a Hugging Face model, or a Hugging Face id."""
    args: dict[str, Any] = attrs.field(factory=dict, validator=_not_ours)
    """Arguments of vLLM's AsyncEngineArgs, under vLLM's names: { max_model_len = 4096, tensor_parallel_size = 2 }."""
    adapters: dict[str, Path] = attrs.field(factory=dict)
    """LoRA adapters to load at start, directory by name; each is served as a model of its own."""
    role: str = attrs.field(default="aggregated", validator=v.in_(["aggregated", "prefill", "decode", "encode"]))
    """`prefill` reads prompts and hands their KV blocks to `decode` workers; `aggregated` does both. `encode` reads images before, and nothing else."""
    transfer: dict[str, Any] = attrs.field(factory=dict)
    """How blocks travel between the two, as in vLLM's KVTransferConfig. Default: { kv_connector = "NixlConnector" }, which needs the package nixl."""
    fetch_timeout: float = attrs.field(default=30.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which a `decode` worker gives blocks up when nothing comes from the worker that has them, and reads the prompt itself."""
    encoders: dict[str, Any] = attrs.field(factory=dict)
    """How what `encode` workers make of images reaches those who read prompts, as in vLLM's ECTransferConfig; the same for both."""
    kv_events: bool = True
    """Publish what the prefix cache stores and removes."""
    headless: bool = False
    """This node runs a part of an engine whose head is on another node, and serves nobody itself: `args` say which part, as for `vllm serve --headless`."""
    start_method: str = attrs.field(default="spawn", validator=v.in_(["spawn", "fork"]))
    """How the engine's process is made. `fork` starts within seconds, on CPU only."""
    _running: Running | Headless | None = attrs.field(default=None, init=False, repr=False)

    async def start(self, context: EngineContext) -> ModelCard:
        progress = _Progress(context)
        beating = asyncio.create_task(progress.beat(), name="start of vLLM")
        try:
            self._running = running = await self._start(context, progress.phase)
        finally:
            beating.cancel()
        context.progress("ready", 1.0)
        return running.card

    async def _start(self, context: EngineContext, phase: Callable[[str], None]) -> Running | Headless:
        phase("import vLLM")
        vllm = await asyncio.to_thread(vllm_api.load)
        directory = tempfile.TemporaryDirectory(prefix="dynamo-vllm-")
        phase("resolve the model")
        config = await asyncio.to_thread(vllm_api.engine_config, vllm, self._arguments(vllm, Path(directory.name)), headless=self.headless)
        place = vllm_nodes.place(config)
        if self.headless:
            if place is None:
                raise _NO_PLACE
            found = card.of_headless(vllm, config, place.ranks)
            return await Headless.start(vllm, config, place, self.start_method, found, context, phase)
        return await self._start_head(vllm, config, place, directory, context, phase)

    async def _start_head(self, vllm: Vllm, config: Any, place: Place | None, directory: tempfile.TemporaryDirectory[str], context: EngineContext,
                          phase: Callable[[str], None]) -> Running:  # fmt: skip
        caches = self._caches and config.cache_config.enable_prefix_caching and config.model_config.runner_type != "pooling"
        loads = LoadReports(context.load)
        fetches = Fetches(self.fetch_timeout) if self.role == "decode" else None
        ranks = range(config.parallel_config.data_parallel_size) if place is None else place.ranks
        # before the engine: what it publishes first must find somebody who listens
        feeds = [KvFeed(rank, vllm_api.kv_endpoints(Path(directory.name), rank), context.kv_events, media=MEDIA) for rank in (ranks if caches else ())]
        broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        others = None if place is None else OtherNodes(place, vllm.version, lambda reason: self._lost(reason, broken), self._leaving)
        engine: Any = None
        try:
            if others is not None:
                await others.open()
            phase("load the model" if others is None else "load the model, wait for the other nodes")
            listeners = [loads.record] if fetches is None else [loads.record, fetches.record]
            engine = await launched(lambda: vllm_api.launch(vllm, config, self.start_method, vllm_api.stat_logger(vllm, *listeners)), broken)
            if caches and others is not None:
                feeds += [KvFeed(rank, endpoints, context.kv_events, media=MEDIA) for rank, endpoints in vllm_nodes.kv_sources(engine).items()]
                if silent := set(range(config.parallel_config.data_parallel_size)) - {feed.rank for feed in feeds}:
                    log.warning("no KV events come from ranks %s, whose nodes have kv_events = false: routers take their caches for empty", sorted(silent))
            tokenizer = await asyncio.to_thread(card.tokenizer_json, engine)
            task = await vllm_api.pooling_task(engine)
            found = card.card_of(vllm, engine, tokenizer, kv_events=caches, lora=config.lora_config is not None, role=self.role, task=task)
            self._running = running = Running(vllm, engine, found, tokenizer, context, loads, fetches, feeds, others, directory)
            if broken.done():
                broken.result()
            phase("warm up")
            await running.warm_up()
            for name, path in self.adapters.items():
                await running.adapters.load(name, path)
        except BaseException:
            self._running = None
            for feed in feeds:
                await feed.close()
            if engine is not None:
                await vllm_api.shut_down(engine, 0)
            if others is not None:
                await others.close()
            directory.cleanup()
            raise
        finally:
            broken.cancel()
        if others is not None:
            others.ready()
        return running

    def _lost(self, reason: str, broken: asyncio.Future[None]) -> None:
        """A node that this engine cannot do without is gone."""
        if isinstance(self._running, Running):
            self._running.lost(reason)
        elif not broken.done():
            broken.set_exception(EngineFailed(reason))

    def _leaving(self, reason: str) -> None:
        if isinstance(self._running, Running):
            self._running.leave(reason)

    @property
    def _caches(self) -> bool:
        return self.kv_events and self.role != "encode"

    def _arguments(self, vllm: Vllm, directory: Path) -> dict[str, Any]:
        args: dict[str, Any] = {"scheduling_policy": "priority", **self.args, "model": self.model, "served_model_name": card.name_of(self.model)}
        if self._caches:
            args["kv_events_config"] = vllm_api.kv_events_config(vllm, directory, headless=self.headless)
        if self.role in ("prefill", "decode"):
            args["kv_transfer_config"] = vllm_api.kv_transfer_config(vllm, self.role, self.transfer)
        if self.encoders:
            args["ec_transfer_config"] = vllm_api.encoder_transfer_config(self.role, self.encoders)
        elif self.role == "encode":
            raise _NO_WAY
        if self.adapters:
            ranks = [card.lora_rank(path) or 16 for path in self.adapters.values()]
            args = {"enable_lora": True, "max_lora_rank": max(16, *ranks), "max_loras": len(self.adapters), **args}
        return args

    # -------------------------------------------------------------- requests

    async def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        async with aclosing(self._alive().generate(request, context)) as outputs:
            async for output in outputs:
                yield output

    def artifact(self, digest: str) -> bytes:
        running = self._running
        if running is None or running.card.tokenizer is None or digest != running.card.tokenizer.digest:
            raise KeyError(digest)
        return running.tokenizer

    # -------------------------------------------------------------- optional capabilities

    async def probe(self) -> None:
        """One token of real work, in a cache of its own."""
        await self._alive().probe()

    async def drain(self) -> None:
        await self._alive().drain()

    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        return self._alive().controls()

    def metrics(self) -> bytes:
        return b"" if self._running is None else self._running.metrics()

    async def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()

    def _alive(self) -> Running | Headless:
        if self._running is None:
            raise EngineDead("vLLM is not running")
        return self._running


class _Progress:
    """Repeats the phase of a start that takes long."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._phase = "start"

    def phase(self, phase: str) -> None:
        self._phase = phase
        self._context.progress(phase, None)

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(2.0)
            self._context.progress(self._phase, None)
