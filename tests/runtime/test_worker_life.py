"""The worker role with an engine that can be made to hang, break and die, over planes in memory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import attrs
import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Config, Status, Use
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.context import Context
from dynamo_core.engines.echo import EchoEngine
from dynamo_core.errors import EngineDead, EngineFailed, WorkerDraining, WorkerOverloaded
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.metrics import WorkerMetrics
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.status import serve_status, status_app
from dynamo_core.runtime.worker import Worker
from dynamo_core.runtime.worker_role import serve
from dynamo_core.types import Output, Request, Stops

_names = itertools.count()


@attrs.define
class FragileEngine(EchoEngine):
    """The echo engine, with switches."""

    hang: bool = False
    broken: Exception | None = None
    start_error: Exception | None = None
    context: Any = None
    stopped: int = 0

    async def start(self, context: Any) -> Any:
        self.context = context
        if self.start_error is not None:
            raise self.start_error
        return await super().start(context)

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        async for output in super().generate(request, context):
            while self.hang:
                await asyncio.sleep(0.01)
            if self.broken is not None:
                raise self.broken
            yield output

    async def stop(self) -> None:
        self.stopped += 1
        await super().stop()

    def controls(self) -> dict[str, Any]:
        async def sleep(arguments: Any) -> Any:
            return {"slept": arguments["seconds"]}

        return {"sleep": sleep}


@attrs.define
class Bench:
    worker: Worker
    engine: FragileEngine
    runtime: Runtime
    registry: CollectorRegistry

    async def visible(self) -> bool:
        return bool(await self.runtime.discovery.items(names.instances("dynamo")))

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while True:
                found = condition()
                if await found if asyncio.iscoroutine(found) else found:
                    return
                await asyncio.sleep(0.005)

    def ask(self, tokens: int = 5, **request: Any) -> AsyncIterator[Output]:
        request = {"id": f"r{next(_names)}", "model": "echo", "token_ids": [97, 98], "stops": Stops(max_tokens=tokens)} | request
        return self.worker.generate(msgspec.msgpack.encode(Request(**request)), Context(request["id"]))

    def read(self, tokens: int) -> tuple[asyncio.Task[BaseException | None], list[Output]]:
        """One request in a task of its own, as a plane serves it: how it ended, and what has come."""
        got: list[Output] = []

        async def reading() -> BaseException | None:
            try:
                async for output in self.ask(tokens):
                    got.append(output)
            except BaseException as e:
                return e
            return None

        return asyncio.create_task(reading()), got

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_component_{name}", {"dynamo_namespace": "dynamo", "dynamo_component": "backend", **labels}) or 0.0


@contextlib.asynccontextmanager
async def bench(engine: FragileEngine | None = None, *, start: bool = True, lease_ttl: float = 5.0, **settings: Any) -> AsyncGenerator[Bench]:
    name = f"worker-life-{next(_names)}"
    config = Config(discovery=Use("memory", {"name": name}), request_plane=Use("in-process"), event_plane=Use("in-process", {"name": name}), lease_ttl=lease_ttl)
    settings = {"canary_interval": 0.05, "canary_timeout": 0.2, "drain_timeout": 0.3} | settings
    engine = engine or FragileEngine(delay=0.005)
    registry = CollectorRegistry()
    async with Runtime.open(config, Plugins.load()) as runtime:
        worker = Worker(runtime, engine, Settings(**settings), WorkerMetrics(registry, namespace="dynamo", component="backend"), settle=0.02)
        if start:
            await worker.start()
        try:
            yield Bench(worker, engine, runtime, registry)
        finally:
            await worker.stop()


async def test_a_worker_is_not_announced_before_its_canary_came_back() -> None:
    engine = FragileEngine(hang=True)
    async with bench(engine, start=False) as it:
        starting = asyncio.create_task(it.worker.start())
        await it.until(lambda: it.worker.phase[0] == "canary")
        assert not await it.visible()
        assert it.worker.problems() == {}  # the card is there; the canary is on its way
        engine.hang = False
        await starting
        assert await it.visible()


async def test_an_engine_that_hangs_leaves_discovery_until_it_answers() -> None:
    async with bench() as it:
        it.engine.hang = True
        await it.until(lambda: "engine" in it.worker.problems())
        assert "no answer to the canary within 0.2 s" in it.worker.problems()["engine"]
        assert not await it.visible()
        it.engine.hang = False
        await it.until(it.visible)
        assert it.worker.problems() == {}


async def test_requests_on_an_engine_that_hangs_end_so_that_they_can_move() -> None:
    async with bench() as it:
        reading, got = it.read(1000)
        await it.until(lambda: got)
        it.engine.hang = True
        ended = await reading
        assert isinstance(ended, EngineDead)
        assert ended.migratable
        it.engine.hang = False
        await it.until(lambda: not it.worker.problems())
        after, _ = it.read(5)
        assert await after is None


async def test_a_canary_that_breaks_in_an_unknown_way_is_a_problem_and_not_the_end_of_canaries() -> None:
    async with bench() as it:
        it.engine.broken = ZeroDivisionError("division by zero")
        await it.until(lambda: "engine" in it.worker.problems())
        assert "division by zero" in it.worker.problems()["engine"]
        it.engine.broken = None
        await it.until(it.visible)


async def test_an_engine_that_offers_something_again_need_not_wait_for_its_next_canary() -> None:
    async with bench() as it:
        it.engine.context.offer(())
        it.engine.broken = EngineDead("nobody is there")
        await it.until(lambda: "engine" in it.worker.problems())
        it.worker.settings = attrs.evolve(it.worker.settings, canary_interval=3600.0)
        await asyncio.sleep(0.2)  # the last of the short intervals is over
        it.engine.broken = None
        it.engine.context.offer([it.worker.card])
        await it.until(it.visible)
        assert it.worker.problems() == {}


async def test_requests_that_move_need_no_canary() -> None:
    async with bench(canary_interval=0.03) as it:
        assert len([output async for output in it.ask(40)]) == 40
        assert it.worker.problems() == {}


async def test_an_engine_that_dies_ends_its_streams_migratably_and_the_role_with_code_1() -> None:
    async with bench(start=False) as it:
        stop = asyncio.Event()
        role = asyncio.create_task(serve(it.worker, stop))
        await it.until(it.visible)
        reading, got = it.read(1000)
        await it.until(lambda: got)
        it.engine.context.died("the GPU fell off the bus")
        assert isinstance(await reading, EngineDead)
        assert EngineDead.migratable
        assert await role == 1
        assert not await it.visible()
        with pytest.raises(EngineDead, match="fell off the bus"):
            await anext(it.ask())


async def test_an_engine_that_does_not_start_is_a_sentence() -> None:
    async with bench(FragileEngine(start_error=RuntimeError("no such device")), start=False) as it:
        with pytest.raises(EngineFailed, match="engine 'echo' did not start: RuntimeError: no such device"):
            await serve(it.worker, asyncio.Event())


async def test_the_role_ends_with_code_0_when_it_is_asked_to() -> None:
    async with bench(start=False) as it:
        stop = asyncio.Event()
        role = asyncio.create_task(serve(it.worker, stop))
        await it.until(it.visible)
        stop.set()
        assert await role == 0
        assert it.engine.stopped


async def test_one_request_too_many_is_refused_migratably_and_counted() -> None:
    async with bench(max_requests=1) as it:
        first = it.ask(100)
        await anext(first)
        with pytest.raises(WorkerOverloaded, match="max_requests"):
            await anext(it.ask())
        assert WorkerOverloaded.migratable
        assert it.count("requests_total", outcome="worker_overloaded") == 1
        await first.aclose()  # type: ignore[attr-defined]
        assert it.worker.admission.in_flight == 0
        assert it.count("requests_total", outcome="cancelled") == 1


async def test_a_drain_leaves_discovery_first_then_waits_then_breaks_what_is_left() -> None:
    async with bench() as it:
        reading, got = it.read(100_000)
        await it.until(lambda: got)
        draining = asyncio.create_task(it.worker.drain())
        await it.until(lambda: not it.worker._visible)
        assert not await it.visible()
        seen = len(got)
        await it.until(lambda: len(got) > seen)  # what is in progress goes on
        await it.until(lambda: it.worker.admission._closed)
        with pytest.raises(WorkerDraining):
            await anext(it.ask())
        await draining
        assert isinstance(await reading, WorkerDraining)
        assert it.worker.admission.in_flight == 0


async def test_a_drain_is_bounded_when_the_engine_hangs() -> None:
    async with bench() as it:
        reading, got = it.read(100)
        await it.until(lambda: got)
        it.engine.hang = True
        async with asyncio.timeout(10):
            await it.worker.drain()
        assert isinstance(await reading, WorkerDraining)


async def test_a_worker_returns_under_a_new_id_when_its_lease_is_lost() -> None:
    async with bench(lease_ttl=0.5) as it:
        before = it.runtime.id
        await it.runtime.lease.revoke()
        it.runtime.lease.lost.set()
        await it.until(lambda: it.runtime.id != before and not it.runtime.problems())
        keys = await it.runtime.discovery.items("v1/")
        instances = [key for key in keys if key.startswith(names.instances("dynamo"))]
        assert len(instances) == 1
        assert instances[0].endswith(f"{it.runtime.id:016x}")
        assert not any(key.endswith(f"{before:016x}") for key in keys)


async def test_a_renewal_that_fails_half_way_leaves_no_ghost() -> None:
    async with bench(lease_ttl=0.5) as it:
        failures = iter([True, True, False])

        def record(id: int) -> tuple[str, bytes]:
            if next(failures, False):
                raise OSError("the disk is full")
            return f"v1/test/{id:016x}", b"here"

        it.runtime._records["fragile"] = record
        await it.runtime.lease.revoke()
        it.runtime.lease.lost.set()
        await it.until(lambda: it.runtime._lease_problem and "the disk is full" in it.runtime._lease_problem)
        await it.until(lambda: not it.runtime.problems())
        keys = await it.runtime.discovery.items("v1/")
        assert {key.rpartition("/")[2] for key in keys if "/events/" not in key} == {f"{it.runtime.id:016x}"}


async def test_every_role_answers_health_live_metrics_and_control() -> None:
    async with bench() as it:
        app = status_app("backend", it.worker.problems, it.registry, it.worker.control)
        async with serve_status(Status(), app) as url, httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).json() == {"status": "ready", "role": "backend", "pid": os.getpid(), "problems": {}}
            assert (await client.get("/live")).status_code == 200
            assert "dynamo_component_inflight_requests" in (await client.get("/metrics")).text
            assert (await client.get("/control")).json() == {"actions": ["sleep"]}
            assert (await client.post("/control/sleep", json={"seconds": 3})).json() == {"slept": 3}
            unknown = await client.post("/control/dance", json={})
            assert unknown.status_code == 400
            assert "it has: sleep" in unknown.json()["error"]["message"]
            assert (await client.post("/control/sleep", content=b"\xff{")).status_code == 400
            it.engine.hang = True
            await it.until(lambda: it.worker.problems())
            unready = await client.get("/health")
            assert unready.status_code == 503
            assert "canary" in unready.json()["problems"]["engine"]
            assert (await client.get("/live")).status_code == 200, "a liveness probe must not kill a worker that may recover"


async def test_what_a_worker_counts() -> None:
    async with bench() as it:
        assert len([output async for output in it.ask(7)]) == 7
        assert it.count("requests_total", outcome="done") == 1
        assert it.count("prompt_tokens_total") == 2
        assert it.count("output_tokens_total") == 7
        assert it.count("request_duration_seconds_count") == 1
        it.engine.broken = ZeroDivisionError("secret prompt text")
        with pytest.raises(ZeroDivisionError):
            async for _ in it.ask():
                pass
        assert it.count("requests_total", outcome="internal") == 1
