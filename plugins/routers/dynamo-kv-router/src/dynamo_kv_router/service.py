"""A router that stands by itself: it answers questions, selects workers for those who send requests themselves, and passes streams on.

Endpoints of the request plane: `generate` (a `Request` in, its outputs back), `select`, `progress`, `release`, `best_worker`, `overlap_scores`, `load`, `dump`.
All but `generate` take and give one object in msgpack. `dynamo_kv_router.web` has the same over HTTP.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry

from dynamo_core.cards import Role
from dynamo_core.context import Context
from dynamo_core.errors import RequestError, Unavailable
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.pipeline.model import ServedModel
from dynamo_core.preprocess.limits import check_token_ids, fit
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.runtime.runtime import EndpointHandler
from dynamo_core.types import Hints, Output, Request
from dynamo_kv_router.facts import OVERLAPS
from dynamo_kv_router.provider import KvIndex
from dynamo_kv_router.reservations import Progress, Release, Reservations

LEVELS = ("device", "host", "disk", "external")

T = TypeVar("T", bound=msgspec.Struct)


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `select`, `best_worker` and `overlap_scores` take."""

    token_ids: list[int]
    model: str | None = None
    """May be left out where there is one model."""
    request_id: str = ""
    """`select` makes one up when it is empty."""
    adapter: str | None = None
    cache_salt: str | None = None
    hints: Hints = Hints()
    max_tokens: int | None = None
    role: Role | None = None
    """Of the workers that are asked about; those that read prompts when left out."""


class RouterService:
    """The answers, over a catalog that follows the fleet."""

    def __init__(self, catalog: FleetCatalog, registry: CollectorRegistry, *, silence: float) -> None:
        """:param registry: where the catalog counts. :param silence: seconds without a word after which a selected request is taken to have ended."""
        self.catalog = catalog
        self.registry = registry
        self._active: set[str] = set()
        self._reservations = Reservations(registry, self._active, silence=silence)
        self._serial = itertools.count(2)

    # -------------------------------------------------------------- questions, which change nothing

    def best_worker(self, question: Question) -> dict[str, Any]:
        """Where the request would go now. Nothing is booked. `worker` is null when nobody can take it, and `reason` says why."""
        model = self._model(question.model)
        dispatcher = model.dispatcher(question.role or model.roles()[0])
        decision = dispatcher.router.dry_run(self._asked(question, model))
        return {
            "worker": None if decision.worker is None else _worker(model, dispatcher, decision.worker),
            "overlap_tokens": decision.overlap_tokens, "decision": decision.id, "reason": decision.reason,
        }

    def overlap_scores(self, question: Question) -> dict[str, Any]:
        """Prompt tokens that each worker holds, by tier."""
        model = self._model(question.model)
        router = model.dispatcher(question.role or model.roles()[0]).router
        weighed = router.weigh(self._asked(question, model))
        columns = [(level, weighed.columns.get(fact)) for level, fact in zip(LEVELS, OVERLAPS, strict=True)]
        return {
            "prompt_tokens": len(question.token_ids),
            "workers": [
                {"instance": f"{worker.instance:016x}", "dp_rank": worker.dp_rank, "label": weighed.labels[row],
                 **{level: int(column[row]) for level, column in columns if column is not None}}
                for row, worker in enumerate(weighed.workers)
            ],
        }

    def load(self) -> dict[str, Any]:
        """Everything that the router knows of each worker, by model and role."""
        return {f"{m.name}/{role}": d.router.status() for m in self.catalog.models() if isinstance(m, ServedModel) for role, d in m.dispatchers.items()}

    def dump(self) -> dict[str, Any]:
        """The state of the router: models, workers, stacks, degraded states, queues, reservations, indexes. No prompts."""
        dispatchers = {f"{m.name}/{role}": d for m in self.catalog.models() if isinstance(m, ServedModel) for role, d in m.dispatchers.items()}
        indexes = {name: part.component.status() for name, d in dispatchers.items() for part in d.router.providers if isinstance(part.component, KvIndex)}
        waiting = {name: d.waiting for name, d in dispatchers.items()}
        return {**self.catalog.status(), "waiting": waiting, "reservations": len(self._reservations), "indexes": indexes}

    # -------------------------------------------------------------- requests that the caller sends himself

    async def select(self, question: Question, context: Context) -> dict[str, Any]:
        """Where the request goes: it is booked there until `release`. If there is a queue, waits in it, until `context` is cancelled at the latest.

        :raises DynamoError: as `generate` does.
        """
        model = self._model(question.model)
        fit(model.card, len(question.token_ids), question.max_tokens)
        asked = self._asked(question, model, question.request_id or uuid.uuid4().hex)
        dispatcher = model.dispatcher(asked.role)
        booking = await self._reservations.reserve(dispatcher, asked, context, model.card.block_size)
        return {
            "request_id": booking.request_id, "worker": _worker(model, dispatcher, booking.worker),
            "overlap_tokens": booking.decision.overlap_tokens, "decision": booking.decision.id,
        }

    def progress(self, word: Progress) -> dict[str, Any]:
        """A selected request goes on. :raises RequestNotFound: it is not known here."""
        self._reservations.progress(word)
        return {}

    def release(self, word: Release) -> dict[str, Any]:
        """A selected request has ended. :raises RequestNotFound: it is not known here."""
        self._reservations.release(word)
        return {}

    # -------------------------------------------------------------- requests that are passed on

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Sequence[Output]]:
        """Route the request, and give its outputs as they come; it moves to another worker when one is lost."""
        model = self._model(request.model)
        if request.id in self._active:
            # Two requests of one id would share a booking.
            request = msgspec.structs.replace(request, id=f"{request.id}-{next(self._serial):x}")
        self._active.add(request.id)
        try:
            stream = model.tokens(request, context)
            await stream.start()
            try:
                while outputs := await stream.read():
                    yield outputs
            finally:
                stream.cancel("the caller stopped reading")
        finally:
            self._active.discard(request.id)

    # --------------------------------------------------------------

    def _model(self, name: str | None) -> ServedModel:
        if name is None:
            models = self.catalog.models()
            if not models:
                raise Unavailable(self.catalog.not_ready() or "no model is served yet")
            if len(models) > 1:
                raise RequestError(f"there are {len(models)} models here; say which one", param="model")
            name = models[0].name
        return self.catalog.get(name)

    def _asked(self, question: Question, model: ServedModel, request_id: str | None = None) -> RoutingRequest:
        check_token_ids(model.card, question.token_ids)
        role = question.role or model.roles()[0]
        return RoutingRequest(
            request_id or question.request_id, model.name, question.token_ids, len(question.token_ids), role, question.hints,
            adapter=question.adapter, cache_salt=question.cache_salt, max_tokens=question.max_tokens,
            prefills=role not in ("decode", "encode"),  # who asks for these has somebody else read the prompt
        )

    def endpoints(self) -> dict[str, EndpointHandler]:
        """For `Runtime.serve`."""
        def one(answer: Callable[[bytes], dict[str, Any]]) -> EndpointHandler:
            async def handler(payload: bytes, context: Context) -> AsyncIterator[bytes]:
                yield msgspec.msgpack.encode(answer(payload))

            return handler

        async def select(payload: bytes, context: Context) -> AsyncIterator[bytes]:
            yield msgspec.msgpack.encode(await self.select(_read(payload, Question), context))

        async def generate(payload: bytes, context: Context) -> AsyncIterator[Output]:
            async for outputs in self.generate(_read(payload, Request), context):
                for output in outputs:
                    yield output

        return {
            "generate": generate,
            "select": select,
            "progress": one(lambda payload: self.progress(_read(payload, Progress))),
            "release": one(lambda payload: self.release(_read(payload, Release))),
            "best_worker": one(lambda payload: self.best_worker(_read(payload, Question))),
            "overlap_scores": one(lambda payload: self.overlap_scores(_read(payload, Question))),
            "load": one(lambda _: self.load()),
            "dump": one(lambda _: self.dump()),
        }


def _worker(model: ServedModel, dispatcher: Dispatcher, worker: Worker) -> dict[str, Any]:
    """For those who send requests there."""
    instance, member = dispatcher.instances.get(worker.instance), model.members.get(worker.instance)
    url = None if member is None else member.card.runtime.get("url")
    return {
        "instance": f"{worker.instance:016x}", "dp_rank": worker.dp_rank, "label": dispatcher.label(worker), "address": instance.address if instance else "",
        **({} if url is None else {"url": url}),
    }


def _read(payload: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"this is no {kind.__name__.lower()}: {e}") from e
