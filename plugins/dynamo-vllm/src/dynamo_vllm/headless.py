"""A node without a head: it runs engine cores, or single GPUs, of a vLLM whose head is on another node.

Requests reach it through vLLM itself, so it serves nobody and stands in no list of workers. What its ranks store in their caches is read by the head,
which tells the routers of it under its own name; so are its load and vLLM's series of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from typing import Any

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines import EngineContext
from dynamo_core.errors import EngineDead, EngineFailed, WorkerDraining
from dynamo_core.types import Output, Request
from dynamo_vllm import vllm_nodes
from dynamo_vllm.launch import launched
from dynamo_vllm.nodes import Head, Place
from dynamo_vllm.vllm_api import Vllm

log = logging.getLogger(__name__)

_LOOK = 0.25
"""Seconds between two looks at the processes."""
_SHUTDOWN = 2.0


class Headless:
    """Runs from `start` until the head leaves or a process of its own ends, which `context.died` is told."""

    tokenizer = b""

    def __init__(self, card: ModelCard, context: EngineContext, head: Head, processes: vllm_nodes.Processes) -> None:
        self.card = card
        self._context = context
        self._head = head
        self._processes = processes
        self._dead: str | None = None
        self._head_left = asyncio.Event()
        self._watching = [asyncio.create_task(self._watch_head(), name="watch the head"), asyncio.create_task(self._watch(), name="watch engine cores")]

    @classmethod
    async def start(cls, vllm: Vllm, config: Any, place: Place, start_method: str, card: ModelCard, context: EngineContext,
                    phase: Callable[[str], None]) -> Headless:  # fmt: skip
        """:raises ConfigError: the head does not take this node. :raises EngineFailed: the head left, or a process ended, before the engine was up."""
        context.offer(())  # nobody is to send requests here
        phase(f"wait for the head at {place.host}:{place.port}")
        head = await Head.find(place, vllm.version)
        ready = asyncio.create_task(head.ready(), name="wait for the head")
        processes: vllm_nodes.Processes | None = None
        try:
            phase("load the model")
            processes = await launched(partial(vllm_nodes.launch_headless, vllm, config, start_method), ready)
            while not ready.done() and all(process.is_alive() for process in processes.processes):
                await asyncio.wait((ready,), timeout=_LOOK)
            if not ready.done():
                raise EngineFailed("an engine core of this node ended before the engine was up; the lines above say why")
            ready.result()
        except BaseException:
            await ended(ready)
            head.close()
            if processes is not None:
                await asyncio.to_thread(processes.end, 0.0)
            raise
        return cls(card, context, head, processes)

    async def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        raise WorkerDraining("this node serves its ranks through the one with the head")
        yield Output()

    async def probe(self) -> None:
        if self._dead is not None:
            raise EngineDead(self._dead)

    async def _watch_head(self) -> None:
        await self._head.gone()
        self._head_left.set()
        self._died(f"{self._head.name} has left; its next engine needs a new start of this node")

    async def _watch(self) -> None:
        while all(process.is_alive() for process in self._processes.processes):  # noqa: ASYNC110 (nothing tells of their end on every platform)
            await asyncio.sleep(_LOOK)
        self._died("an engine core of this node ended; the lines above say why")

    def _died(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
            self._context.died(reason)

    async def drain(self) -> None:
        """Wait until the head needs this node no more: it has requests of its own to end."""
        if self._dead is None:
            self._dead = "this node is leaving"  # as it was told to: what ends from now on is no accident
            self._head.leave()
            await self._head_left.wait()

    async def stop(self) -> None:
        self._dead = self._dead or "vLLM was stopped"
        await ended(*self._watching)
        self._head.close()
        await asyncio.to_thread(self._processes.end, _SHUTDOWN)

    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        return {}

    def metrics(self) -> bytes:
        return b""
