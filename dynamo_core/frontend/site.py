"""Everything but the completion endpoints: one Starlette application, with errors in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from dynamo_core.errors import DynamoError
from dynamo_core.frontend import debug, health, models, openapi
from dynamo_core.frontend.failure import Failure
from dynamo_core.frontend.service import Service

log = logging.getLogger("dynamo.frontend")

Handler = Callable[[Service, Request], Awaitable[Response]]


def site(service: Service, extra_routes: Sequence[BaseRoute]) -> Starlette:
    def get(path: str, handler: Handler) -> Route:
        async def endpoint(request: Request) -> Response:
            return await handler(service, request)

        return Route(path, endpoint, methods=["GET"])

    routes: list[BaseRoute] = [
        get("/v1/models", models.all_models),
        get("/v1/models/{id:path}", models.one_model),
        get("/health", health.health),
        get("/live", health.live),
        get("/ready", health.ready),
        get("/metrics", _metrics),
        get("/openapi.json", openapi.document),
        get("/docs", openapi.page),
    ]
    if service.config.debug_routes:
        routes += [get("/debug/decisions/{id:path}", debug.decision), get("/debug/fleet", debug.fleet)]
    # The handler of Exception is called by Starlette's outermost layer, which then raises again for the server's log; ours has it already.
    return Starlette(routes=[*routes, *extra_routes], exception_handlers={HTTPException: _http_error, DynamoError: _dynamo_error, Exception: _dynamo_error})


async def _metrics(service: Service, request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service.metrics.registry), headers={"content-type": content_type})


async def _dynamo_error(request: Request, error: Exception) -> Response:
    failure = Failure.of(error, _id(request))
    if failure.unexpected:
        log.error("request failed unexpectedly", exc_info=error, extra={"request_id": _id(request), "path": request.url.path})
    return _response(failure)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_")
    message = {404: f"there is nothing at {request.url.path[:200]!r}", 405: f"{request.url.path} does not take {request.method}"}.get(
        error.status_code, error.detail
    )
    response = _response(Failure(error.status_code, message, "invalid_request_error", code))
    response.headers.update(error.headers or {})
    return response


def _response(failure: Failure) -> Response:
    response = Response(failure.body, failure.status, media_type="application/json")
    response.headers.update({name.decode("latin-1"): value.decode("latin-1") for name, value in failure.headers})
    return response


def _id(request: Request) -> str:
    return request.scope["state"]["request_id"]
