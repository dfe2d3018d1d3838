"""Workers that the process which routes runs itself, for engines that compute nothing in it: clients of servers elsewhere.

Each is a worker as any other, with a lease of its own, and nobody else notices where it runs. One that ends or does not start takes
nobody with it: `problems()` says why it is missing, and it is started again, for ever, with growing pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.config import build
from dynamo_core.config.schema import Config
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.engines.contract import HasMetrics, Reports
from dynamo_core.errors import DynamoError
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.metrics import ProcessRegistry
from dynamo_core.runtime.restarts import Crashes
from dynamo_core.runtime.worker import Worker
from dynamo_core.runtime.worker_role import serve, unstarted

log = logging.getLogger(__name__)

_LAST = 5.0
"""Seconds to end in, beyond the drain times of requests and of engines."""


def copies(config: Config, *, inside: bool) -> Iterator[tuple[str, int, Settings]]:
    """Each worker of the file that runs `inside` the process that routes, or in one of its own: a name, and the number and content of its table."""
    for index, settings in enumerate(config.workers):
        if settings.inside == inside:
            for copy in range(settings.count):
                yield f"{settings.name}-{copy}" if len(config.workers) == 1 else f"{settings.name}-{index}.{copy}", index, settings


@contextlib.asynccontextmanager
async def workers_inside(config: Config, plugins: Plugins, registry: ProcessRegistry) -> AsyncGenerator[WorkersInside]:
    """Run the workers of the file that are `inside`, and drain them when left. Their series are in `registry`, with the label `worker`.

    :raises ConfigError: an engine cannot be built from its options; nothing was started.
    """
    wanted = list(copies(config, inside=True))
    for _, _, settings in wanted:
        build(settings.engine, "engine", plugins)
    inside = WorkersInside([_Place(name, settings, config, plugins) for name, _, settings in wanted])
    for place in inside.places:
        registry.workers[place.name] = place.series
    stop = asyncio.Event()
    tasks = [asyncio.create_task(place.keep(stop), name=f"worker {place.name}") for place in inside.places]
    try:
        yield inside
    finally:
        stop.set()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=2 * max(settings.drain_timeout for _, _, settings in wanted) + _LAST)
            for task in late:
                log.error("%s does not end", task.get_name())
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_LAST)


class WorkersInside:
    """Those of one process."""

    def __init__(self, places: Sequence[_Place]) -> None:
        self.places = places

    def problems(self) -> dict[str, str]:
        """Named degraded states of all of them; empty when all is well."""
        return {f"{place.name} {name}": problem for place in self.places for name, problem in place.problems().items()}


class _Place:
    """Where one worker runs after another."""

    def __init__(self, name: str, settings: Settings, config: Config, plugins: Plugins) -> None:
        self.name = name
        self._settings = settings
        self._config = config
        self._plugins = plugins
        self._worker: Worker | None = None
        self._registry = CollectorRegistry()
        self._ended: str | None = None
        """Why the last one did."""

    async def keep(self, stop: asyncio.Event) -> None:
        """Have a worker here until `stop` is set."""
        crashes = Crashes()
        while not stop.is_set():
            started = time.monotonic()
            try:
                self._ended = await self._live(stop)
            except DynamoError as e:
                self._ended = str(e)
            except Exception as e:
                log.exception("worker %s failed", self.name)
                self._ended = f"{type(e).__name__}: {e}"
            if not stop.is_set():
                pause = crashes.pause(time.monotonic() - started)
                log.error("worker %s has ended: %s; starting again in %g s", self.name, self._ended, pause)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await stop.wait()

    async def _live(self, stop: asyncio.Event) -> str:
        """One worker, from start to end. Returns what it died of. :raises DynamoError: it did not start."""
        self._registry = CollectorRegistry()
        async with unstarted(self._config, self._settings, self._plugins, self._registry, self.name) as worker:
            self._worker = worker
            try:
                await serve(worker, stop)
                return worker.problems().get("engine", "the engine died")
            finally:
                self._worker = None

    def problems(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self._ended is not None and (self._worker is None or self._worker.card is None):
            found["engine"] = f"it has ended and is started again: {self._ended}"
        elif self._worker is None:
            found["starting"] = "join the fleet"
        if self._worker is not None:
            if isinstance(self._worker.engine, Reports):
                found.update(self._worker.engine.problems())
            found.update(self._worker.problems())
        return found

    def series(self) -> Iterable[Metric]:
        """What a worker in a process of its own exports at its status address; nothing while there is none."""
        if self._worker is None:
            return
        yield from self._registry.collect()
        if isinstance(engine := self._worker.engine, HasMetrics):
            try:
                yield from list(text_string_to_metric_families(engine.metrics().decode()))
            except Exception:  # one engine must not take the series of all others away
                log.exception("the metrics of worker %s cannot be read", self.name)
