"""A whole fleet in one process: real workers, real router, real pipeline, planes in memory (or any other).

    async with Cluster.up(workers=4, engine="echo") as cluster:
        generation = await cluster.generate("hello", max_tokens=200)
        await generation.read()
        await cluster.kill(0)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import attrs
from prometheus_client import CollectorRegistry

from dynamo_core.config import build
from dynamo_core.config.schema import Config, Migration, Router, Use
from dynamo_core.config.schema import Worker as WorkerSettings
from dynamo_core.context import Context
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.pipeline.contract import Generation, Model
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.metrics import WorkerMetrics
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.worker import Worker
from dynamo_core.types import Delta, Guided, Hints, Request, Sampling, Stops, TextOptions

_numbers = itertools.count()


def _repeatable(router: Router) -> Router:
    return router if router.seed is not None else attrs.evolve(router, seed=0)


@attrs.define
class Member:
    """One worker of the cluster and how to end it."""

    worker: Worker
    runtime: Runtime
    stack: contextlib.AsyncExitStack


class Cluster:
    """Use `Cluster.up`. Workers are numbered in the order in which they were started."""

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config = config
        self.plugins = plugins
        self.members: list[Member | None] = []
        self.registry = CollectorRegistry()
        self.catalog: FleetCatalog
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    @contextlib.asynccontextmanager
    async def up(cls, *, workers: int = 2, engine: str | Use = "echo", options: Mapping[str, Any] | None = None, router: Router | None = None,
                 migration: Migration | None = None, lease_ttl: float = 2.0, discovery: Use | None = None, request_plane: Use | None = None,
                 event_plane: Use | None = None, plugins: Plugins | None = None, settings: Mapping[str, Any] | None = None,
                 around: Sequence[Use] = ()) -> AsyncGenerator[Cluster]:
        """Start workers and a frontend's catalog, and wait until every worker serves.

        :param options: of the engine. :param settings: more fields of `config.schema.Worker`.
        """
        name = f"cluster-{next(_numbers)}"
        use = engine if isinstance(engine, Use) else Use(engine, dict(options or {}))
        config = Config(
            discovery=discovery or Use("memory", {"name": name}), request_plane=request_plane or Use("in-process"),
            event_plane=event_plane or Use("in-process", {"name": name}), router=_repeatable(router or Router()),
            migration=migration or Migration(wait=3.0, inhibit=0.3),
            lease_ttl=lease_ttl, around=tuple(around), workers=(WorkerSettings(engine=use, **dict(settings or {})),),
        )
        cluster = cls(config, plugins or Plugins.load())
        async with cluster._stack:
            runtime = await cluster._stack.enter_async_context(Runtime.open(config, cluster.plugins))
            cluster.catalog = await cluster._stack.enter_async_context(FleetCatalog.open(runtime, cluster.registry))
            for _ in range(workers):
                await cluster.add()
            await cluster.wait_ready(workers)
            try:
                yield cluster
            finally:
                await asyncio.gather(*(cluster.drain(i) for i, member in enumerate(cluster.members) if member), return_exceptions=True)

    async def add(self, **changes: Any) -> int:
        """Start one more worker. :param changes: of its settings. Returns its number."""
        settings = attrs.evolve(self.config.workers[0], **changes)
        stack = contextlib.AsyncExitStack()
        config = attrs.evolve(self.config, namespace=settings.namespace or self.config.namespace)
        runtime = await stack.enter_async_context(Runtime.open(config, self.plugins))
        registry = CollectorRegistry()
        worker = Worker(runtime, build(settings.engine, "engine", self.plugins), settings,
                        WorkerMetrics(registry, namespace=config.namespace, component=settings.name), settle=0.05)
        await worker.start()
        self.members.append(Member(worker, runtime, stack))
        return len(self.members) - 1

    def worker(self, number: int) -> Worker:
        member = self.members[number]
        assert member is not None, f"worker {number} has ended"
        return member.worker

    async def drain(self, number: int) -> None:
        """End a worker in order."""
        member, self.members[number] = self.members[number], None
        if member is not None:
            await member.worker.drain()
            await member.worker.stop()
            await member.stack.aclose()

    async def kill(self, number: int) -> None:
        """End a worker as a crash would: its connections break at once, its records stay until the lease runs out."""
        member, self.members[number] = self.members[number], None
        assert member is not None, f"worker {number} has ended"
        await member.runtime.crash()
        await member.worker.stop()

    async def wait_ready(self, workers: int, timeout: float = 20.0) -> None:
        """Wait until this many workers are proven."""
        async with asyncio.timeout(timeout):
            while sum(w["proven"] for model in self.catalog.status()["models"].values() for w in model["workers"]) != workers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    @property
    def model(self) -> Model:
        """The only model, or the first by name."""
        return self.catalog.models()[0]

    async def generate(self, prompt: str | Sequence[int], *, max_tokens: int = 16, stop: Sequence[str] = (), n: int = 1, hints: Hints | None = None,
                       temperature: float = 0.0, guided: Guided | None = None, context: Context | None = None, **stops: Any) -> Generation:
        """Start one generation, as the frontend would."""
        ids = await self.model.preprocessor.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else list(prompt)
        context = context or Context(f"test-{next(_numbers)}")
        request = Request(id=context.id, model=self.model.name, token_ids=ids, sampling=Sampling(temperature=temperature, n=n), guided=guided,
                          stops=Stops(max_tokens=max_tokens, **stops), hints=hints or Hints())
        return await self.model.start(request, TextOptions(stop=tuple(stop)), context)


async def read_all(generation: Generation) -> tuple[str, list[int], str | None]:
    """Text, token ids and finish reason of the first choice."""
    text, ids, reason = "", list[int](), None
    while deltas := await generation.read():
        delta: Delta
        for delta in deltas:
            if delta.index == 0:
                text += delta.text
                ids += delta.token_ids
                reason = delta.finish_reason or reason
    return text, ids, reason
