"""`dynamo frontend`: the HTTP surface over the fleet, from start to drained."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp

from dynamo_core.config import build
from dynamo_core.config.schema import Config, Status
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.frontend.app import App, create_app
from dynamo_core.frontend.certificates import unusable
from dynamo_core.frontend.debug import explained
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.frontend.siblings import siblings
from dynamo_core.observability import tracing
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.holding import HoldingRoom
from dynamo_core.pipeline.observers import finished_observers
from dynamo_core.pipeline.reload import follow_sighup
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.inside import workers_inside
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.status import serve_status
from dynamo_core.runtime.worker_role import process_registry

log = logging.getLogger(__name__)

_MEET = 10.0
"""Seconds that a replica waits for its fleet before it shares the port."""


async def serve_frontend(config: Config, plugins: Plugins, stop: asyncio.Event, again: Callable[[], Config] | None = None) -> int:
    """Serve until `stop` is set, then drain: discovery, and the workers inside, stay up until the last stream has ended.

    :param again: reads the configuration anew; SIGHUP has the routing stacks follow it.
    """
    settings = config.frontend
    if settings.tls is not None and (problems := list(unusable(settings.tls))):
        raise ConfigError(*problems)
    server: Any = build(settings.http_server, "http_server", plugins)
    tracing.setup("dynamo-frontend", config.observability.otlp_endpoint, config.observability.trace_ratio)
    registry = process_registry()
    try:
        async with (
            Runtime.open(config, plugins) as runtime,
            FleetCatalog.open(runtime, registry) as catalog,
            workers_inside(config, plugins, registry) as inside,
            HoldingRoom.open(runtime, catalog, settings.hold, registry) if settings.hold else contextlib.nullcontext() as holding,
            contextlib.AsyncExitStack() as entered,
        ):
            catalog.beside.append(inside)
            authenticator: Any = build(settings.authenticator, "authenticator", plugins) if settings.authenticator else None
            limiter: Any = build(settings.rate_limiter, "rate_limiter", plugins) if settings.rate_limiter else None
            if hasattr(limiter, "__aenter__"):
                await entered.enter_async_context(limiter)
            metrics = HttpMetrics(registry, tenant_labels=settings.tenant_labels)
            if (beside := siblings(registry, lambda id: explained(catalog, id))) is not None:
                metrics.siblings = await entered.enter_async_context(beside)
            app = create_app(
                settings, catalog, metrics=metrics, authenticator=authenticator, limiter=limiter,
                holding=holding, observers=finished_observers(plugins),
                extra_routes=[route for use in settings.routes for route in build(use, "routes", plugins).routes(catalog)],
                middleware=[Middleware(build(use, "middleware", plugins).wrap) for use in settings.middleware],
            )
            scheme = "https" if settings.tls else "http"

            def listening(port: int) -> None:
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                url = f"{scheme}://{host}:{port}"
                log.info("listening on %s", url)
                registered.append(asyncio.create_task(runtime.register("status", lambda id: (names.of_status(config.namespace, "frontend", id), url.encode()))))

            registered: list[asyncio.Task[None]] = []
            if settings.host not in ("127.0.0.1", "localhost", "::1") and settings.authenticator is None:
                log.warning("listening beyond this machine (%s) without authentication: anybody who reaches it can use it", settings.host)
            if again is not None:
                follow_sighup(config, catalog, again)
            leaving = asyncio.create_task(_leave(stop, app, runtime), name="leave")
            try:
                async with _admin(config, app.admin, runtime):
                    if settings.processes > 1:
                        # The kernel gives every process that listens its share of the clients: none for one that has yet to meet the fleet.
                        await catalog.settled(_MEET)
                    await server.serve(app, host=settings.host, port=settings.port, tls=settings.tls, stop=stop, reuse_port=settings.processes > 1,
                                       on_listening=listening, drain_timeout=settings.drain_timeout)
            except OSError as e:
                if registered:
                    raise
                raise ConfigError(Problem(str(e), remedy="choose another frontend.host or frontend.port")) from e
            finally:
                leaving.cancel()
                await asyncio.gather(*registered, leaving, return_exceptions=True)
        return 0
    finally:
        tracing.shutdown()


async def _leave(stop: asyncio.Event, app: App, runtime: Runtime) -> None:
    """Say everywhere that this process is leaving, before its last answer is out."""
    await stop.wait()
    app.drain()
    await runtime.unregister("status")


@contextlib.asynccontextmanager
async def _admin(config: Config, app: ASGIApp, runtime: Runtime) -> AsyncGenerator[None]:
    """Serve the operators' side where the configuration wants it. :raises OSError: every port that it may take is taken."""
    settings = config.frontend.admin
    if settings is None:
        yield
        return
    if settings.host not in ("127.0.0.1", "localhost", "::1") and settings.key is None:
        log.warning("metrics and debug routes are open to anybody who reaches %s: frontend.admin.key is not set", settings.host)
    last = settings.port + config.frontend.processes - 1 if settings.port else 0
    async with contextlib.AsyncExitStack() as exits:
        url = ""
        for port in range(settings.port, last + 1):
            try:
                url = await exits.enter_async_context(serve_status(Status(settings.host, port), app))
                break
            except OSError as e:
                if e.errno != errno.EADDRINUSE or port == last:
                    raise
        log.info("metrics and debug routes at %s", url)
        await runtime.register("admin", lambda id: (names.of_status(config.namespace, "frontend-admin", id), url.encode()))
        yield
