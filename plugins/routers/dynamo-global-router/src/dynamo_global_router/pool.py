"""One pool: its fleet, followed as a frontend would, and what can be said of it at any moment."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import attrs
import msgspec
from prometheus_client import CollectorRegistry

from dynamo_core.cards import ModelCard, Role
from dynamo_core.config import Config, Router, Use
from dynamo_core.context import Context
from dynamo_core.engines import admit
from dynamo_core.errors import AllBusy, DynamoError, NoWorker, RequestError, WorkerOverloaded
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.dispatch import Dispatcher, routing_request
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.pipeline.model import ServedModel
from dynamo_core.plugins import Plugins
from dynamo_core.preprocess.contract import Preprocessor
from dynamo_core.preprocess.limits import fit
from dynamo_core.routing.contract import Fact, Worker
from dynamo_core.routing.facts import (
    BOOKED_PREFILL_TOKENS,
    ENGINE_REPORT_AGE,
    ENGINE_RUNNING,
    ENGINE_WAITING,
    IN_FLIGHT,
    INHIBITED,
    MAX_SEQUENCES,
    OVERLAP_TOKENS,
    PROVEN,
)
from dynamo_core.routing.router import Weighed
from dynamo_core.routing.stack import build_stack
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Request
from dynamo_global_router.card import stranger
from dynamo_global_router.contract import PoolFacts, PoolName
from dynamo_global_router.rates import Speed, Workload
from dynamo_global_router.record import PoolRow
from dynamo_global_router.settings import PoolSettings

log = logging.getLogger(__name__)

FACTS = ("fleet", "bookings", "engine-load")
"""Providers that a pool's stack has in any case: the facts of a pool come from them."""
FULL = 0.25
"""Seconds for which a pool that refused a request as full is not asked again."""
FAILURES = 3
"""Requests that a pool fails in a row, after which it counts as degraded."""
FRESH = 3.0
"""Seconds for which an engine's report of its load is believed."""
_PROBE = Request(id="", model="", token_ids=[0])


@attrs.frozen
class Look:
    """A pool as one request finds it."""

    row: PoolRow
    load: Workload = attrs.field(default=Workload(0, 0))
    queued: int = 0
    worker: Worker | None = None
    """The one that would generate."""
    split: bool = False
    """Another one reads the prompt."""
    refusal: RequestError | None = None
    """Why it can never take this request."""


class Pool:
    """Follow it with `run`."""

    def __init__(self, settings: PoolSettings, name: PoolName, config: Config, plugins: Plugins, role: Role, model: str | None,
                 tokenizer: Callable[[ModelCard, bytes], None]) -> None:
        """:param config: of this process. :param tokenizer: is given the content of each tokenizer that the pool's workers name."""
        self.settings = settings
        self.name = name
        self.registry = CollectorRegistry()
        self.speed = Speed(settings.rates)
        self.learned_at = -math.inf
        """When an answer last taught something about the time between tokens."""
        self.first_card: ModelCard | None = None
        """Of the model as it was first seen, in whatever pool; who disagrees with it is not used."""
        self._config = _config(settings, config)
        self._plugins = plugins
        self._role: Role = role
        self._model = model
        self._tokenizer = tokenizer
        self._catalog: FleetCatalog | None = None
        self._problem = "its fleet is not known yet"
        self._full_until = 0.0
        self._failures = 0
        self._degraded_until = 0.0
        self._last_error = ""
        self._sent = -math.inf

    # -------------------------------------------------------------- the fleet

    async def run(self) -> None:
        """Follow the pool's workers until cancelled; what cannot be reached is tried again."""
        delay = 0.5
        while True:
            self.registry = CollectorRegistry()
            try:
                async with Runtime.open(self._config, self._plugins) as runtime, FleetCatalog.open(runtime, self.registry, self._tokens_only) as catalog:
                    self._catalog = catalog
                    await asyncio.Event().wait()
            except Exception as e:
                log.warning("pool %s cannot be followed, trying again: %s", self.name.name, e)
                self._problem = f"its fleet cannot be followed: {e}"
            finally:
                self._catalog = None
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)

    def _tokens_only(self, card: ModelCard, content: bytes) -> Preprocessor:
        self._tokenizer(card, content)
        return cast("Preprocessor", None)  # text is the frontends' affair: nobody here asks for it

    def model(self) -> ServedModel | None:
        """What its workers serve, ready or not."""
        known = {} if self._catalog is None else self._catalog.offered()
        if self._model is not None:
            return known.get(self._model)
        found = [model for model in known.values() if model.card.adapter is None]
        return found[0] if len(found) == 1 else None

    def card(self) -> ModelCard | None:
        """Of workers that can serve now; `None` while the pool is gone."""
        model = self.model()
        return None if model is None or self._missing(model) is not None else model.card

    def _missing(self, model: ServedModel | None) -> str | None:
        """Why it can take nothing; `None` when it can."""
        catalog = self._catalog
        if catalog is None:
            return self._problem
        if model is None:
            several = sorted(catalog.offered()) if self._model is None else ()
            if len(several) > 1:
                return f"it serves several models: {', '.join(several)}; the option `model` says which one is meant"
            return catalog.not_ready() or f"it does not serve {self._model!r}"
        if self.first_card is not None and (why := stranger(self.first_card, model.card)) is not None:
            return why
        if self._role == "aggregated":
            return model.not_ready()
        members = [member for member in model.members.values() if member.card.role == self._role]
        if any(member.card.handover.protocol == "bootstrap" for member in members):
            return "its workers hand over by the protocol bootstrap, for which prefill and decode must be in one pool"
        if any(member.proven for member in members):
            return None
        return f"{len(members)} {self._role} workers of model {model.name!r} are registered, and none is ready"

    # -------------------------------------------------------------- what a request finds

    def look(self, request: Request = _PROBE, tenant: str | None = None) -> Look:
        """How the pool is, and what it would do for this request."""
        model = self.model()
        if (missing := self._missing(model)) is not None or model is None:
            return Look(PoolRow(self.name.name, "gone", missing or ""))
        if request is not _PROBE:
            try:
                admit(request, model.card)
                fit(model.card, len(request.token_ids), request.stops.max_tokens)
            except RequestError as e:
                return Look(PoolRow(self.name.name, "unfit", str(e)), refusal=e)
        reads, writes = model.roles() if self._role == "aggregated" else (self._role, self._role)
        reader, writer = model.dispatcher(reads), model.dispatcher(writes)
        asked = routing_request(request, tenant=tenant)
        reading = reader.router.weigh(asked)
        writing = reading if writer is reader else writer.router.weigh(asked)
        state, why = self._state(reader, reading) or self._state(writer, writing) or self._health(writing)
        reads_it, writes_it = _seat(reading), _seat(writing)
        if reads_it is None or writes_it is None or state in ("gone", "full"):
            return Look(PoolRow(self.name.name, state, why))
        queued = reader.waiting + (writer.waiting if writer is not reader else 0)
        facts, load = self._facts(request, reading, reads_it, writing, writes_it, queued)
        return Look(PoolRow(self.name.name, state, why, facts), load, queued, writes_it, reads != writes)

    def _state(self, dispatcher: Dispatcher, weighed: Weighed) -> tuple[str, str] | None:
        """`gone` or `full`, and why; `None` when it is neither."""
        queue = dispatcher.router.stack.queue
        if queue is not None and dispatcher.waiting >= queue.limit and not queue.classes:
            return "full", f"{dispatcher.waiting} requests wait in its router's queue"
        if weighed.choice.worker is None:
            reasons = [f"{weighed.labels[row]}: {what}" for row, _, what in weighed.choice.rejected[:3]]
            why = "; ".join(reasons) + (f"; and {len(weighed.choice.rejected) - 3} more" if len(weighed.choice.rejected) > 3 else "")
            full = dispatcher.router.all_busy(weighed) or time.monotonic() < self._full_until
            if full and queue is not None:
                return None  # it can wait there
            return ("full" if full else "gone"), why or "no worker is registered"
        if time.monotonic() < self._full_until:
            return "full", self._last_error
        return None

    def _health(self, weighed: Weighed) -> tuple[str, str]:
        if time.monotonic() < self._degraded_until:
            return "degraded", f"{self._failures} requests in a row failed there: {self._last_error}"
        total = len(weighed.workers)
        well = sum(proven and not inhibited for proven, inhibited in zip(
            weighed.columns.get(PROVEN, (True,) * total), weighed.columns.get(INHIBITED, (0.0,) * total), strict=True))
        if well < self.settings.healthy_share * total:
            return "degraded", f"only {well} of {total} workers are in order"
        return "ready", ""

    def _facts(self, request: Request, reading: Weighed, reads: Worker, writing: Weighed, writes: Worker, queued: int) -> tuple[PoolFacts, Workload]:
        prompt = len(request.token_ids)
        uncached = 0 if self._role == "decode" and request.transfer is not None else max(1, prompt - int(_of(reading, OVERLAP_TOKENS, 0, reads)))
        workers = len(reading.choice.candidates)
        # Those in the pool's queue will be shared by its workers; nobody knows how long their prompts are, so they count as this one.
        before = -(-queued // len(reading.workers))
        backlog = int(_of(reading, BOOKED_PREFILL_TOKENS, 0, reads)) + before * uncached
        sequences = in_progress(writing, writes) + before
        load = Workload(uncached + backlog, sequences, int(_of(writing, MAX_SEQUENCES, 0, writes)))
        estimate = self.speed.estimate(load, request.hints.expected_output_tokens, time.monotonic() - self._sent)
        return PoolFacts(self.name.name, self.name.rank, self.name.cost, workers, uncached, backlog, sequences, load.max_sequences, estimate), load

    def sequences(self, worker: Worker) -> int | None:
        """Requests in progress on one worker now; `None` when it has left."""
        if (model := self.model()) is None:
            return None
        writes = model.roles()[1] if self._role == "aggregated" else self._role
        weighed = model.dispatcher(writes).router.weigh(routing_request(_PROBE))
        return in_progress(weighed, worker) if worker in weighed.workers else None

    # -------------------------------------------------------------- requests

    def stream(self, request: Request, context: Context) -> TokenStream:
        """Not started. :raises DynamoError: nobody can take it."""
        if (model := self.model()) is None:
            raise NoWorker("the request", [f"pool {self.name.name} has just lost its model"])
        self._sent = time.monotonic()
        if request.model != model.name:
            request = msgspec.structs.replace(request, model=model.name)
        return model.tokens(request, context, None if self._role == "aggregated" else self._role)

    def served(self) -> None:
        """A request had its first output."""
        self._failures = 0
        self._degraded_until = 0.0

    def failed(self, error: DynamoError) -> None:
        """A request failed before its first output, and not by its own fault."""
        self._last_error = str(error)
        if isinstance(error, AllBusy | WorkerOverloaded):
            self._full_until = time.monotonic() + FULL
            return
        self._failures += 1
        if self._failures >= FAILURES:
            self._degraded_until = time.monotonic() + self._config.migration.inhibit

    # -------------------------------------------------------------- what people ask

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        """Of the pool's own router."""
        return None if self._catalog is None else self._catalog.decision(decision_id)

    def problems(self) -> Mapping[str, str]:
        """What is wrong in the pool, whether or not it can serve."""
        return {} if self._catalog is None else self._catalog.problems()


def _seat(weighed: Weighed) -> Worker | None:
    """Where the request would go: the chosen worker, or, while it would have to wait in the queue, the one with the least to do."""
    return weighed.choice.worker or min(weighed.workers, key=lambda worker: in_progress(weighed, worker), default=None)


def in_progress(weighed: Weighed, worker: Worker) -> int:
    """What routers have sent to the worker, or what its engine says when that is more."""
    booked = int(_of(weighed, IN_FLIGHT, 0, worker))
    if _of(weighed, ENGINE_REPORT_AGE, math.inf, worker) > FRESH:
        return booked
    return max(booked, int(_of(weighed, ENGINE_RUNNING, 0, worker)) + int(_of(weighed, ENGINE_WAITING, 0, worker)))


def _of(weighed: Weighed, fact: Fact[Any], default: float, worker: Worker) -> float:
    column = weighed.columns.get(fact)
    return default if column is None else column[weighed.workers.index(worker)]


def _config(settings: PoolSettings, config: Config) -> Config:
    """That of this process, in the pool's namespace, store and routing stack. Wrappers around requests are the frontends' affair."""
    return attrs.evolve(config, namespace=settings.namespace or settings.name, discovery=settings.discovery or config.discovery,
                        router=_with_facts(settings.router), around=(), workers=())


def check_stacks(router: Router, plugins: Plugins) -> None:
    """:raises ConfigError: the stack of some role cannot start; nobody must wait for a pool's first worker to hear of it."""
    for role in ("aggregated", *_ROLES):
        if role == "aggregated" or getattr(router, role) is not None:
            build_stack(_with_facts(router), plugins, role=role)


_ROLES: tuple[Role, ...] = ("prefill", "decode", "encode")


def _with_facts(router: Router) -> Router:
    named = {use.name for use in router.facts}
    roles = {role: _with_facts(table) for role in _ROLES if (table := getattr(router, role)) is not None}
    return attrs.evolve(router, facts=(*router.facts, *(Use(name) for name in FACTS if name not in named)), **roles)
