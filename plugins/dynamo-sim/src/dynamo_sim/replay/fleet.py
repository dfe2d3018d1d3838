"""The production side of a replay: real routers, with real fact providers, which believe that virtual time is time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from dynamo_core.cards import ModelCard
from dynamo_core.config import Router as RouterConfig
from dynamo_core.kv import Change
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.kv.wire import Op
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.queue import RouterQueue, Ticket
from dynamo_core.routing.record import Decision
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Hints, Instance, Load
from dynamo_sim.scheduler import Limits

MODEL = "replay"
_NO_HINTS = Hints()


class Placed(NamedTuple):
    row: int
    """Of the worker."""
    overlap: int
    """Prompt tokens that it is believed to have."""


def _placed(decision: Decision | None) -> Placed | None:
    return None if decision is None or decision.worker is None else Placed(decision.worker.instance - 1, decision.overlap_tokens)


class _Told:
    """The share of a router: what it books, the routers of other frontends hear at once."""

    def __init__(self, others: Sequence[Router]) -> None:
        self._others = others

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        for router in self._others:
            router.booked(request, worker, overlap_tokens, elsewhere=True)

    def first_token(self, request_id: str, worker: Worker) -> None:
        for router in self._others:
            router.first_token(request_id, worker)

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        for router in self._others:
            router.grew(request_id, worker, output_tokens)

    def finished(self, request_id: str, worker: Worker) -> None:
        for router in self._others:
            router.finished(request_id, worker, "done")


class Routers:
    """The routers of several frontends before one fleet. Request i goes through router `i % len(routers)`."""

    def __init__(self, config: RouterConfig, plugins: Plugins, workers: int, limits: Limits, *, count: int = 1, share: bool = True, seed: int = 0) -> None:
        """:param share: routers tell each other what they book, as frontends do."""
        self.now = 0.0
        """Seconds of virtual time."""
        self.workers = [Worker(i + 1) for i in range(workers)]
        self.routers = [
            Router(MODEL, build_stack(config, plugins), seed=seed + i, decisions=0, clock=lambda: self.now, wall=lambda: self.now) for i in range(count)
        ]
        for router in self.routers:
            router.patience.budget = math.inf  # how busy this machine is must not decide anything
            if share and count > 1:
                router.share = _Told([other for other in self.routers if other is not router])
        self._stirs_all = share
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
        self._queues = [RouterQueue(r, r.stack.queue, clock=lambda: self.now) if r.stack.queue is not None else None for r in self.routers]
        self._stirred: dict[int, None] = {}
        """Routers whose queues are to be looked at."""
        self._settled: list[Ticket] = []
        self._indexes: list[Any] = [part.component for router in self.routers for part in router.providers if hasattr(part.component, "apply")]
        self.takes_changes = bool(self._indexes)

    def request(self, number: int, names: NDArray[np.uint64], prompt: int, block_size: int, session: int) -> RoutingRequest:
        hints = _NO_HINTS if session < 0 else Hints(session=str(session))
        return RoutingRequest(str(number), MODEL, Prehashed(names, prompt, block_size), prompt, hints=hints)

    def submit(self, number: int, request: RoutingRequest) -> Placed | None:
        """Choose and book. `None`: see `release`. :raises NoWorker: nobody can take it."""
        k = number % len(self.routers)
        if (queue := self._queues[k]) is not None:
            ticket = queue.submit(request, self._settled.append)
            return None if ticket.waiting or ticket in self._settled else _placed(ticket.decision)
        router = self.routers[k]
        decision = router.route(request)
        assert decision.worker is not None
        router.booked(request, decision.worker, decision.overlap_tokens)
        return _placed(decision)

    def release(self) -> list[tuple[int, Placed | None]]:
        """Requests that have left the queues since the last call; `None` for those that were turned away."""
        for k in self._stirred:
            if (queue := self._queues[k]) is not None:
                queue.changed()
                queue.release()
        self._stirred.clear()
        settled = [(int(ticket.request.id), _placed(ticket.decision)) for ticket in self._settled]
        self._settled.clear()
        return settled

    def stir(self) -> bool:
        """Let `release` look at all queues. Returns whether anybody waits."""
        waiting = [k for k, queue in enumerate(self._queues) if queue is not None and len(queue)]
        self._stirred.update(dict.fromkeys(waiting))
        return bool(waiting)

    def first_token(self, number: int, row: int, cached: int) -> None:
        self._of(number).first_token(str(number), self.workers[row], cached)

    def grew(self, number: int, row: int, tokens: int) -> None:
        self._of(number, stirs=False).grew(str(number), self.workers[row], tokens)

    def finished(self, number: int, row: int) -> None:
        self._of(number).finished(str(number), self.workers[row], "done")

    def _of(self, number: int, *, stirs: bool = True) -> Router:
        """The router that the request went through."""
        k = number % len(self.routers)
        if stirs:
            for at in range(len(self._queues)) if self._stirs_all else (k,):
                if (queue := self._queues[at]) is not None and len(queue):
                    self._stirred[at] = None
        return self.routers[k]

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
