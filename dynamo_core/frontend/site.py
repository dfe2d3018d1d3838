"""Everything but the completion endpoints: one Starlette application, with errors in OpenAI's shape."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from http import HTTPStatus

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dynamo_core.errors import DynamoError, Unauthorized
from dynamo_core.frontend import debug, health, models, openapi
from dynamo_core.frontend.exchange import request_id
from dynamo_core.frontend.failure import Failure
from dynamo_core.frontend.respond import respond
from dynamo_core.frontend.service import Service

log = logging.getLogger("dynamo.frontend")

Handler = Callable[[Service, Request], Awaitable[Response]]


def site(service: Service, extra_routes: Sequence[BaseRoute]) -> Starlette:
    get = partial(_get, service)
    routes: list[BaseRoute] = [
        get("/v1/models", models.all_models),
        get("/v1/models/{id:path}", models.one_model),
        get("/health", health.health),
        get("/live", health.live),
        get("/ready", health.ready),
        get("/openapi.json", openapi.document),
        get("/docs", openapi.page),
    ]
    if service.config.admin is None:
        routes += _operators(service)
    return _application([*routes, *extra_routes])


def admin_site(service: Service) -> ASGIApp:
    """What operators and their monitoring read, for an address of its own. All but health needs the key, if there is one."""
    get = partial(_get, service)
    inner = _application([get("/health", health.health), get("/live", health.live), get("/ready", health.ready), *_operators(service)])
    key = service.config.admin.key if service.config.admin else None
    expected = b"Bearer " + key.encode() if key else b""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            scope.setdefault("state", {})["request_id"] = request_id(headers.get(b"x-request-id"))
            scope["admin"] = True
            if key and scope["path"] not in _OPEN and not hmac.compare_digest(headers.get(b"authorization", b""), expected):
                failure = Failure.of(Unauthorized("this address needs the key of frontend.admin.key"), "")
                await respond(send, failure.status, failure.body, failure.headers)
                return
        await inner(scope, receive, send)

    return guarded


_OPEN = ("/health", "/live", "/ready")


def _operators(service: Service) -> list[BaseRoute]:
    routes: list[BaseRoute] = [_get(service, "/metrics", _metrics)]
    if service.config.debug_routes:
        for path, handler in (
            ("/debug/decisions", debug.decisions),
            ("/debug/decisions/{id:path}", debug.decision),
            ("/debug/fleet", debug.fleet),
            ("/debug/routers", debug.routers),
        ):
            routes.append(_get(service, path, handler))
    return routes


def _get(service: Service, path: str, handler: Handler) -> Route:
    async def endpoint(request: Request) -> Response:
        return await handler(service, request)

    return Route(path, endpoint, methods=["GET"])


def _application(routes: Sequence[BaseRoute]) -> Starlette:
    # The handler of Exception is called by Starlette's outermost layer, which then raises again for the server's log; ours has it already.
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, DynamoError: _dynamo_error, Exception: _dynamo_error})


async def _metrics(service: Service, request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    siblings = service.metrics.siblings
    return Response(encode(service.metrics.registry if siblings is None else await siblings.together()), headers={"content-type": content_type})


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
