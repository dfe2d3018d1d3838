"""The status endpoint of roles without an HTTP surface of their own: /health, /live, /metrics, /control."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from hypercorn.asyncio import serve
from hypercorn.config import Config as HypercornConfig
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from dynamo_core.config.schema import Status
from dynamo_core.errors import DynamoError, RequestError

Control = Callable[[str | None, Mapping[str, Any]], Awaitable[Any]]


def status_app(role: str, problems: Callable[[], Mapping[str, str]], registry: CollectorRegistry, control: Control | None = None,
               more_metrics: Callable[[], bytes] | None = None, degraded: Callable[[], Mapping[str, str]] | None = None,
               models: Callable[[], Sequence[str] | None] | None = None) -> Starlette:
    """:param problems: named degraded states; any makes `/health` 503. :param control: runs an operator's action.

    :param more_metrics: series of the engine, in Prometheus' text format. :param degraded: named states of the engine, in which it serves all the same.
    :param models: what may be asked of this process, by name; `None` while nothing may.
    """

    async def health(_: Request) -> Response:
        found = problems()
        lesser = degraded() if degraded is not None else {}
        status = "unready" if found else "degraded" if lesser else "ready"
        answer: dict[str, Any] = {"status": status, "role": role, "pid": os.getpid(), "problems": {**lesser, **found}}
        if models is not None:
            answer["models"] = models()
        return _json(answer, 503 if found else 200)

    async def live(_: Request) -> Response:
        return _json({"status": "live", "role": role})

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry) + (more_metrics() if more_metrics is not None else b""), media_type=CONTENT_TYPE_LATEST)

    async def act(request: Request) -> Response:
        try:
            arguments: Any = msgspec.json.decode(await request.body() or b"{}")
            if not isinstance(arguments, dict):
                raise RequestError("the body must be a JSON object")
            assert control is not None
            return _json(await control(request.path_params.get("action"), arguments))  # pyright: ignore[reportUnknownArgumentType]
        except msgspec.DecodeError as e:
            return _json({"error": {"message": f"the body is not JSON: {e}", "code": "invalid_request"}}, 400)
        except DynamoError as e:
            return _json({"error": {"message": str(e), "code": e.code}}, e.status)

    routes = [Route("/health", health), Route("/live", live), Route("/metrics", metrics)]
    if control is not None:
        routes += [Route("/control", act, methods=["GET"]), Route("/control/{action}", act, methods=["POST"])]
    return Starlette(routes=routes)


@contextlib.asynccontextmanager
async def serve_status(settings: Status, app: ASGIApp) -> AsyncGenerator[str]:
    """Serve until left; yields the URL. Port 0 takes any free port."""
    listener = socket.create_server((settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    host, port = listener.getsockname()[:2]
    config = HypercornConfig()
    config.bind = [f"fd://{listener.fileno()}"]
    config.graceful_timeout = 1.0
    config.accesslog = config.errorlog = None
    stop = asyncio.Event()
    server = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait), name="status endpoint")  # pyright: ignore[reportArgumentType]
    try:
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        stop.set()
        await asyncio.gather(server, return_exceptions=True)
        listener.detach()


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
