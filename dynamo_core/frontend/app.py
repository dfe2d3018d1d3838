"""The application: raw ASGI for the completion endpoints, Starlette for everything else."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.chat import Chat
from dynamo_core.frontend.completions import Completions
from dynamo_core.frontend.contract import Authenticator, RateLimiter
from dynamo_core.frontend.embeddings import Embeddings
from dynamo_core.frontend.endpoint import Endpoint
from dynamo_core.frontend.exchange import request_id
from dynamo_core.frontend.failure import Failure
from dynamo_core.frontend.media import MediaFetcher
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.frontend.pooling import Classify, Rerank, Score
from dynamo_core.frontend.respond import respond
from dynamo_core.frontend.service import FinishedObserver, Service
from dynamo_core.frontend.site import admin_site, site
from dynamo_core.pipeline.contract import Catalog, Holding

COMPLETION_PATHS = {
    "/v1/chat/completions": Chat, "/v1/completions": Completions, "/v1/embeddings": Embeddings,
    "/v1/classify": Classify, "/v1/score": Score, "/v1/rerank": Rerank,
}  # fmt: skip


def create_app(
    config: Frontend,
    catalog: Catalog,
    *,
    metrics: HttpMetrics,
    observers: Sequence[FinishedObserver] = (),
    authenticator: Authenticator | None = None,
    limiter: RateLimiter | None = None,
    holding: Holding | None = None,
    extra_routes: Sequence[BaseRoute] = (),
    middleware: Sequence[Middleware] = (),
) -> App:
    """The whole HTTP surface over a catalog of models.

    :param observers: called at the end of each completion request. :param extra_routes: Starlette routes, tried after the built-in ones.
    :param middleware: around everything, the first one outermost.
    """
    return App(Service(config, catalog, metrics, observers, authenticator, limiter, holding), extra_routes, middleware)


class App:
    """An ASGI application that knows whether it is leaving."""

    def __init__(self, service: Service, extra_routes: Sequence[BaseRoute], middleware: Sequence[Middleware]) -> None:
        self._service = service
        fetcher = MediaFetcher(service.config.media)
        self._endpoints = {path: Endpoint(service, Chat(fetcher) if family is Chat else family()) for path, family in COMPLETION_PATHS.items()}
        self._site = site(service, extra_routes)
        self._stack: ASGIApp = self._dispatch
        for layer in reversed(middleware):
            self._stack = layer.cls(self._stack, *layer.args, **layer.kwargs)

    @property
    def admin(self) -> ASGIApp:
        """The operators' side, for an address of its own (`frontend.admin`)."""
        return admin_site(self._service)

    @property
    def in_progress(self) -> int:
        """Completion requests between their head and their last byte."""
        return len(self._service.in_progress)

    def drain(self) -> None:
        """Say on /health and /ready that this process is leaving. It goes on serving: load balancers take a while to notice."""
        self._service.draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stack(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if (endpoint := self._endpoints.get(scope["path"])) is not None:
                if scope["method"] == "POST":
                    await endpoint(scope, receive, send)
                else:
                    await _not_post(scope, send)
                return
            send = _with_request_id(scope, send)
        await self._site(scope, receive, send)


async def _not_post(scope: Scope, send: Send) -> None:
    given = request_id(next((value for name, value in scope["headers"] if name == b"x-request-id"), None))
    headers = [(b"x-request-id", given.encode("latin-1")), (b"allow", b"OPTIONS, POST")]
    if scope["method"] == "OPTIONS":
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return
    failure = Failure(405, f"{scope['path']} takes POST, not {scope['method']}", "invalid_request_error", "method_not_allowed")
    await respond(send, 405, failure.body, headers)


def _with_request_id(scope: Scope, send: Send) -> Send:
    given = request_id(next((value for name, value in scope["headers"] if name == b"x-request-id"), None))
    scope.setdefault("state", {})["request_id"] = given

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", given.encode("latin-1"))]
        await send(message)

    return sending
