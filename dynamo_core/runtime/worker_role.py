"""The life of a worker, from start to drained, and `dynamo worker`: a process with one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import attrs
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from dynamo_core.config import build
from dynamo_core.config.schema import Config
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.engines.contract import HasMetrics, Reports
from dynamo_core.errors import ConfigError, DynamoError, EngineDead, EngineFailed, Problem
from dynamo_core.observability import tracing
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.metrics import ProcessRegistry, WorkerMetrics
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.status import serve_status, status_app
from dynamo_core.runtime.worker import Worker

log = logging.getLogger(__name__)


def process_registry() -> ProcessRegistry:
    """A registry with what every process exports of itself: memory, CPU time, open files, collections."""
    registry = ProcessRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


async def serve_worker(config: Config, settings: Settings, plugins: Plugins, stop: asyncio.Event) -> int:
    """Serve until `stop` is set or the engine dies. Returns the exit code: 1 when the engine died.

    :raises ConfigError: the engine cannot be built from its options.
    """
    registry = process_registry()
    async with unstarted(config, settings, plugins, registry) as worker:
        tracing.setup(f"dynamo-{settings.name}", config.observability.otlp_endpoint, config.observability.trace_ratio)
        try:
            if not config.status.enabled:
                return await serve(worker, stop)
            engine = worker.engine
            app = status_app(settings.name, worker.problems, registry, worker.control, engine.metrics if isinstance(engine, HasMetrics) else None,
                             engine.problems if isinstance(engine, Reports) else None,
                             lambda: None if (cards := worker.models()) is None else [card.name for card in cards])
            async with contextlib.AsyncExitStack() as exits:
                try:
                    url = await exits.enter_async_context(serve_status(config.status, app))
                except OSError as e:
                    what = f"the status endpoint cannot listen on {config.status.host}:{config.status.port}: {e.strerror or e}"
                    raise ConfigError(Problem(what, remedy="leave status.port out: any free port is taken")) from e
                space = worker.runtime.config.namespace
                await worker.runtime.register("status", lambda id: (names.of_status(space, settings.name, id), url.encode()))
                return await serve(worker, stop)
        finally:
            tracing.shutdown()


@contextlib.asynccontextmanager
async def unstarted(config: Config, settings: Settings, plugins: Plugins, registry: CollectorRegistry, label: str = "") -> AsyncGenerator[Worker]:
    """A worker with its engine, and a lease of its own until left.

    :param registry: where it counts. :param label: as in `Worker`. :raises ConfigError: the engine cannot be built from its options.
    """
    if settings.namespace is not None:
        config = attrs.evolve(config, namespace=settings.namespace)
    engine: Any = build(settings.engine, "engine", plugins)
    metrics = WorkerMetrics(registry, namespace=config.namespace, component=settings.name)
    async with Runtime.open(config, plugins) as runtime:
        worker = Worker(runtime, engine, settings, metrics, label=label)
        metrics.watch_in_flight(lambda: worker.admission.in_flight)
        yield worker


async def serve(worker: Worker, stop: asyncio.Event) -> int:
    """Start the worker and serve until `stop` is set, then drain; or until its engine dies. Returns the exit code that a process deserves for it.

    :raises DynamoError: the engine did not start.
    """
    stopping = asyncio.create_task(stop.wait())
    died = asyncio.create_task(worker.dead.wait())
    starting = asyncio.create_task(worker.start(), name="start")
    try:
        await asyncio.wait((starting, stopping, died), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            if (error := starting.exception()) is not None:
                if isinstance(error, DynamoError):
                    raise error
                log.error("the engine did not start", exc_info=error)
                raise EngineFailed(f"engine {worker.settings.engine.name!r} did not start: {type(error).__name__}: {error}") from error
            await asyncio.wait((stopping, died), return_when=asyncio.FIRST_COMPLETED)
            if died.done() and not stopping.done():
                # Streams have ended with EngineDead and move elsewhere; nothing is left to wait for.
                await worker.withdraw()
                worker.admission.break_all(EngineDead("the engine died"))
                await worker.admission.idle(2.0)
            else:
                await worker.drain()
        return 1 if died.done() else 0
    finally:
        for task in (stopping, died, starting):
            task.cancel()
        await asyncio.gather(stopping, died, starting, return_exceptions=True)
        await worker.stop()
