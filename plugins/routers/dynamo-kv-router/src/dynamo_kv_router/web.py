"""The standalone router over HTTP, JSON in and out.

    GET    /health /load /dump /metrics /debug/decisions/ID
    POST   /best_worker /overlap_scores /generate /select      /generate streams JSON lines
    POST   /requests/ID                                        a selected request goes on
    DELETE /requests/ID?outcome=done                           it has ended
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError, RequestError
from dynamo_core.frontend.body import read_body
from dynamo_core.types import Hints, Output, Request, Sampling, Stops
from dynamo_kv_router.reservations import Progress, Release
from dynamo_kv_router.service import Question, RouterService

T = TypeVar("T", bound=msgspec.Struct)

Answer = Callable[[HttpRequest], Awaitable[Response]]


def router_app(service: RouterService) -> Starlette:
    """What `dynamo router` answers over HTTP."""
    catalog = service.catalog

    async def health(_: HttpRequest) -> Response:
        missing = catalog.not_ready()
        return _json({"ready": missing is None, "missing": missing, "problems": catalog.problems()}, 200 if missing is None else 503)

    async def metrics(_: HttpRequest) -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    async def decision(http: HttpRequest) -> Response:
        record = catalog.decision(http.path_params["id"])
        return _json({"error": {"message": "no such decision is kept", "code": "not_found"}}, 404) if record is None else _json(record)

    async def load(_: HttpRequest) -> Response:
        return _json(service.load())

    async def dump(_: HttpRequest) -> Response:
        return _json(service.dump())

    async def best_worker(http: HttpRequest) -> Response:
        return _json(service.best_worker(_written(await _body(http), Question)))

    async def overlap_scores(http: HttpRequest) -> Response:
        return _json(service.overlap_scores(_written(await _body(http), Question)))

    async def select(http: HttpRequest) -> Response:
        question = _written(await _body(http), Question)
        async with _while_there(http, Context(question.request_id)) as context:
            return _json(await service.select(question, context))

    async def progress(http: HttpRequest) -> Response:
        word = _read(await _body(http) or b"{}", Progress)
        service.progress(msgspec.structs.replace(word, request_id=http.path_params["id"]))
        return Response(status_code=204)

    async def release(http: HttpRequest) -> Response:
        service.release(_parameters({**http.query_params, "request_id": http.path_params["id"]}, Release))
        return Response(status_code=204)

    async def generate(http: HttpRequest) -> Response:
        request = _written(await _body(http), Request)
        async with _while_there(http, Context(request.id)) as context:
            outputs = service.generate(request, context)
            first = await anext(outputs, ())
        return StreamingResponse(_lines(first, outputs), media_type="application/x-ndjson")

    gets: Mapping[str, Answer] = {"/health": health, "/metrics": metrics, "/debug/decisions/{id:path}": decision, "/load": load, "/dump": dump}
    posts: Mapping[str, Answer] = {
        "/best_worker": best_worker, "/overlap_scores": overlap_scores, "/generate": generate, "/select": select, "/requests/{id:path}": progress,
    }
    return Starlette(
        routes=[
            *(Route(path, answer) for path, answer in gets.items()),
            *(Route(path, answer, methods=["POST"]) for path, answer in posts.items()),
            Route("/requests/{id:path}", release, methods=["DELETE"]),
        ],
        exception_handlers={DynamoError: _error},
    )


@contextlib.asynccontextmanager
async def _while_there(http: HttpRequest, context: Context) -> AsyncGenerator[Context]:
    """The context is cancelled when the client leaves before its answer. The body has been read."""
    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        context.cancel("the client left")

    watching = asyncio.create_task(watch(), name="client of the router")
    try:
        yield context
    finally:
        await ended(watching)


# -------------------------------------------------------------- what comes in


LIMIT, PATIENCE = 32 * 2**20, 60.0
"""Bytes of one body, and seconds for it to come."""


async def _body(http: HttpRequest) -> bytes:
    """:raises RequestError: it is too large, or too slow. :raises Cancelled: the client left."""
    return bytes(await read_body(http.receive, limit=LIMIT, timeout=PATIENCE))


def _read(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise RequestError(f"this is no {kind.__name__.lower()}: {e}") from e


def _parameters(given: Mapping[str, str], kind: type[T]) -> T:
    """From a query string, where everything is text."""
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as e:
        raise RequestError(f"this is no {kind.__name__.lower()}: {e}") from e


_STRUCTS: Mapping[str, type[msgspec.Struct]] = {"stops": Stops, "sampling": Sampling, "hints": Hints}
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _written(body: bytes, kind: type[T]) -> T:
    """People write these, so that a name that means nothing is an error, inside as well. :raises RequestError: it is something else."""
    found = _read(body, kind)
    fields = _raw.decode(body)
    unknown = [name for name in fields if name not in kind.__struct_fields__]
    for name, struct in _STRUCTS.items():
        if name in fields:
            unknown += [f"{name}.{inner}" for inner in _raw.decode(fields[name]) if inner not in struct.__struct_fields__]
    if unknown:
        raise RequestError(f"this is no {kind.__name__.lower()}: Object contains unknown field `{unknown[0]}`")
    return found


# -------------------------------------------------------------- what goes out


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


async def _error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, DynamoError)
    answer = _json({"error": {"message": str(error), "code": error.code}}, error.status)
    if (seconds := getattr(error, "retry_after", None)) is not None:
        answer.headers["retry-after"] = str(max(1, math.ceil(seconds)))
    return answer


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
