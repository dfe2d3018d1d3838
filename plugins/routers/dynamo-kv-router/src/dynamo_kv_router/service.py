"""A router that stands by itself: it answers questions and passes streams on, over the request plane and over HTTP.

Endpoints: `generate` (a `Request` in, its outputs back), `best_worker`, `overlap_scores`, `load`, `dump`. All but `generate` take and give one object:
msgpack over the request plane, JSON over HTTP (`POST /best_worker`, `GET /load`, ...). HTTP has metrics and decision records besides.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dynamo_core.cards import Role
from dynamo_core.context import Context
from dynamo_core.errors import DynamoError, RequestError
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.model import ServedModel
from dynamo_core.preprocess.limits import check_token_ids
from dynamo_core.routing.contract import RoutingRequest
from dynamo_core.runtime.runtime import EndpointHandler
from dynamo_core.types import Hints, Output, Request, Sampling, Stops
from dynamo_kv_router.facts import OVERLAPS
from dynamo_kv_router.provider import KvIndex

LEVELS = ("device", "host", "disk", "external")


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `best_worker` and `overlap_scores` take."""

    token_ids: list[int]
    model: str | None = None
    """May be left out where there is one model."""
    request_id: str = ""
    adapter: str | None = None
    cache_salt: str | None = None
    hints: Hints = Hints()
    max_tokens: int | None = None
    role: Role | None = None
    """Of the workers that are asked about; those that read prompts when left out."""


class RouterService:
    """The endpoints, over a catalog that follows the fleet."""

    def __init__(self, catalog: FleetCatalog, registry: CollectorRegistry) -> None:
        """:param registry: where the catalog counts, for `GET /metrics`."""
        self._catalog = catalog
        self._registry = registry
        self._active: set[str] = set()
        self._serial = itertools.count(2)
        self._answers: Mapping[str, Callable[[bytes, msgspec.msgpack.Decoder[Question] | msgspec.json.Decoder[Question]], Any]] = {
            "best_worker": lambda body, decoder: self.best_worker(_question(body, decoder)),
            "overlap_scores": lambda body, decoder: self.overlap_scores(_question(body, decoder)),
            "load": lambda body, decoder: self.load(),
            "dump": lambda body, decoder: self.dump(),
        }

    # -------------------------------------------------------------- the answers

    def best_worker(self, question: Question) -> dict[str, Any]:
        """Where the request would go now. Nothing is booked. `worker` is null when nobody can take it, and `reason` says why."""
        model = self._model(question.model)
        dispatcher = model.dispatcher(question.role or model.roles()[0])
        decision = dispatcher.router.dry_run(self._asked(question, model))
        worker = decision.worker
        instance = None if worker is None else dispatcher.instances.get(worker.instance)
        return {
            "worker": None if worker is None else {
                "instance": f"{worker.instance:016x}", "dp_rank": worker.dp_rank, "label": dispatcher.label(worker),
                "address": instance.address if instance else "",
            },
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
        return {f"{m.name}/{role}": d.router.status() for m in self._catalog.models() if isinstance(m, ServedModel) for role, d in m.dispatchers.items()}

    def dump(self) -> dict[str, Any]:
        """The state of the router: models, workers, stacks, degraded states, queues, indexes. No prompts."""
        dispatchers = {f"{m.name}/{role}": d for m in self._catalog.models() if isinstance(m, ServedModel) for role, d in m.dispatchers.items()}
        indexes = {name: part.component.status() for name, d in dispatchers.items() for part in d.router.providers if isinstance(part.component, KvIndex)}
        return {**self._catalog.status(), "waiting": {name: d.waiting for name, d in dispatchers.items()}, "indexes": indexes}

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

    def _model(self, name: str | None) -> ServedModel:
        if name is None:
            models = self._catalog.models()
            if len(models) != 1:
                raise RequestError(f"there are {len(models)} models here; say which one", param="model")
            name = models[0].name
        return self._catalog.get(name)

    def _asked(self, question: Question, model: ServedModel) -> RoutingRequest:
        check_token_ids(model.card, question.token_ids)
        return RoutingRequest(
            question.request_id, model.name, question.token_ids, len(question.token_ids), question.role or model.roles()[0], question.hints,
            adapter=question.adapter, cache_salt=question.cache_salt, max_tokens=question.max_tokens,
        )

    # -------------------------------------------------------------- over the request plane

    def endpoints(self) -> dict[str, EndpointHandler]:
        """For `Runtime.serve`."""
        def one(name: str) -> EndpointHandler:
            async def answer(payload: bytes, context: Context) -> AsyncIterator[bytes]:
                yield msgspec.msgpack.encode(self._answers[name](payload, _from_msgpack))

            return answer

        async def generate(payload: bytes, context: Context) -> AsyncIterator[Output]:
            try:
                request = msgspec.msgpack.decode(payload, type=Request)
            except msgspec.MsgspecError as e:
                raise RequestError(f"this is no request: {e}") from e
            async for outputs in self.generate(request, context):
                for output in outputs:
                    yield output

        return {"generate": generate, **{name: one(name) for name in self._answers}}

    # -------------------------------------------------------------- over HTTP

    def app(self) -> Starlette:
        """`GET /health /load /dump /metrics /debug/decisions/ID`, `POST /best_worker /overlap_scores /generate`; the last one streams JSON lines."""
        def one(name: str) -> Callable[[HttpRequest], Any]:
            async def answer(request: HttpRequest) -> Response:
                body = await request.body()
                return _safely(lambda: self._answers[name](body, _from_json))

            return answer

        async def health(_: HttpRequest) -> Response:
            missing = self._catalog.not_ready()
            return _json({"ready": missing is None, "missing": missing, "problems": self._catalog.problems()}, 200 if missing is None else 503)

        async def generate(http: HttpRequest) -> Response:
            try:
                request = _request(await http.body())
                outputs = self.generate(request, Context(request.id))
                first = await anext(outputs, ())
            except DynamoError as e:
                return _error(e)
            return StreamingResponse(_lines(first, outputs), media_type="application/x-ndjson")

        async def metrics(_: HttpRequest) -> Response:
            return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

        async def decision(http: HttpRequest) -> Response:
            record = self._catalog.decision(http.path_params["id"])
            return _json({"error": {"message": "no such decision is kept", "code": "not_found"}}, 404) if record is None else _json(record)

        posts = [Route(f"/{name}", one(name), methods=["POST"]) for name in ("best_worker", "overlap_scores")]
        gets = [Route(f"/{name}", one(name)) for name in ("load", "dump")]
        told = [Route("/health", health), Route("/metrics", metrics), Route("/debug/decisions/{id:path}", decision)]
        return Starlette(routes=[*told, *posts, *gets, Route("/generate", generate, methods=["POST"])])


_from_msgpack = msgspec.msgpack.Decoder(Question)
_from_json = msgspec.json.Decoder(Question)


def _question(body: bytes, decoder: msgspec.msgpack.Decoder[Question] | msgspec.json.Decoder[Question]) -> Question:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as e:
        raise RequestError(f"this is no question: {e}") from e


_STRUCTS: Mapping[str, type[msgspec.Struct]] = {"stops": Stops, "sampling": Sampling, "hints": Hints}
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _request(body: bytes) -> Request:
    """People write these, so that a name that means nothing is an error. :raises RequestError: it is no request."""
    try:
        request = msgspec.json.decode(body, type=Request)
        fields = _raw.decode(body)
        unknown = [name for name in fields if name not in Request.__struct_fields__]
        for name, struct in _STRUCTS.items():
            if name in fields:
                unknown += [f"{name}.{inner}" for inner in _raw.decode(fields[name]) if inner not in struct.__struct_fields__]
    except msgspec.MsgspecError as e:
        raise RequestError(f"this is no request: {e}") from e
    if unknown:
        raise RequestError(f"this is no request: Object contains unknown field `{unknown[0]}`")
    return request


async def _lines(first: Sequence[Output], rest: AsyncIterator[Sequence[Output]]) -> AsyncIterator[bytes]:
    encode = msgspec.json.encode
    try:
        for output in first:
            yield encode(_plain(output)) + b"\n"
        async for outputs in rest:
            yield b"".join(encode(_plain(output)) + b"\n" for output in outputs)
    except DynamoError as e:
        yield encode({"error": {"message": str(e), "code": e.code}}) + b"\n"


def _plain(output: Output) -> dict[str, Any]:
    return {"token_ids": output.token_ids, "index": output.index, "finish_reason": output.finish_reason, "cached_tokens": output.cached_tokens}


def _safely(answer: Callable[[], Any]) -> Response:
    try:
        return _json(answer())
    except DynamoError as e:
        return _error(e)


def _error(error: DynamoError) -> Response:
    return _json({"error": {"message": str(error), "code": error.code}}, error.status)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
