"""The production side of a replay: real routers, with real fact providers, which believe that virtual time is time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from dynamo_core.cards import ModelCard
from dynamo_core.config import Router as RouterConfig
from dynamo_core.errors import NoWorker
from dynamo_core.kv import Change
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.kv.wire import Op
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints, Instance, Load
from dynamo_sim.scheduler import Limits

MODEL = "replay"
_NO_HINTS = Hints()


class Routers:
    """The routers of several frontends before one fleet. Request i goes through router `i % len(routers)`."""

    def __init__(self, config: RouterConfig, plugins: Plugins, workers: int, limits: Limits, *, count: int = 1, seed: int = 0, wall: float = 0.0) -> None:
        """:param wall: Unix time at which the trace begins."""
        self.now = 0.0
        """Seconds of virtual time."""
        self.workers = [Worker(i + 1) for i in range(workers)]
        self.routers = [
            Router(MODEL, build_stack(config, plugins), seed=seed + i, decisions=0, clock=lambda: self.now, wall=lambda: wall + self.now) for i in range(count)
        ]
        self._encode = msgspec.msgpack.Encoder().encode
        self.takes_load = any("load" in router.event_topics() for router in self.routers)
        card = ModelCard(
            name=MODEL, context_length=limits.total_blocks * limits.block_size, block_size=limits.block_size, total_blocks=limits.total_blocks,
            max_sequences=limits.max_sequences, max_batched_tokens=limits.max_batched_tokens, kv_events=limits.prefix_caching, engine="dynamo-sim",
        )
        for router in self.routers:
            for worker in self.workers:
                instance = Instance(id=worker.instance, namespace="replay", component="backend", endpoint="generate", address=f"virtual://{worker.instance}")
                router.joined(worker, instance, card)
                router.proven(worker)
        self._indexes: list[Any] = [part.component for router in self.routers for part in router.providers if hasattr(part.component, "apply")]
        self.takes_changes = bool(self._indexes)

    def request(self, number: int, names: NDArray[np.uint64], prompt: int, block_size: int, session: int) -> RoutingRequest:
        hints = _NO_HINTS if session < 0 else Hints(session=str(session))
        return RoutingRequest(str(number), MODEL, Prehashed(names, prompt, block_size), prompt, hints=hints)

    def route(self, number: int, request: RoutingRequest) -> tuple[int, int] | None:
        """Choose and book: the worker's row, and the prompt tokens that it is believed to have. `None`: nobody can take it now."""
        router = self.routers[number % len(self.routers)]
        try:
            decision = router.route(request)
        except NoWorker:
            return None
        worker = decision.worker
        assert worker is not None
        overlap = decision.overlap_tokens
        router.booked(request, worker, overlap)
        return worker.instance - 1, overlap

    def of(self, number: int) -> Router:
        """The router that request `number` goes through."""
        return self.routers[number % len(self.routers)]

    def changed(self, row: int, changes: Sequence[tuple[bool, NDArray[np.uint64]]]) -> None:
        """A cache changed: (stored or removed, keys)."""
        worker = self.workers[row]
        told = [Change(Op.ADD if stored else Op.REMOVE, 0, keys) for stored, keys in changes]
        for index in self._indexes:
            index.apply(worker, told)

    def reported(self, row: int, load: Load) -> None:
        payload = self._encode(load)
        for router in self.routers:
            router.on_event("load", row + 1, payload)

    def faults(self) -> dict[str, int]:
        """How often each policy and provider was left out."""
        total: dict[str, int] = {}
        for router in self.routers:
            for name, count in router.faults.items():
                total[name] = total.get(name, 0) + count
        return total
