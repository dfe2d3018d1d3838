"""Workers inside the process that routes: each lives and dies by itself, and everybody sees how it is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import sys
import types
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.config.schema import Config, Use
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.context import Context
from dynamo_core.discovery.memory import MemoryDiscovery, MemoryLease
from dynamo_core.engines.echo import EchoEngine
from dynamo_core.errors import ConfigError
from dynamo_core.pipeline.catalog import FleetCatalog
from dynamo_core.plugins import Component, Plugin, Plugins
from dynamo_core.runtime import inside as module
from dynamo_core.runtime import names
from dynamo_core.runtime.inside import workers_inside
from dynamo_core.runtime.metrics import ProcessRegistry, WorkerMetrics
from dynamo_core.runtime.restarts import LONGEST, STABLE, Crashes
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.runtime.worker_role import process_registry
from dynamo_core.types import Request, Stops, TextOptions

_names = itertools.count()
TABLE = Path(__file__).parents[2] / "docs/reference/metrics.md"
engines: list[Fickle] = []


@attrs.define
class Fickle(EchoEngine):
    """The echo engine, with switches that all of one model share."""

    refuses: int = 0
    """So many engines of this model do not start."""
    hangs: bool = False
    """It never ends."""
    context: Any = attrs.field(init=False, default=None)

    async def start(self, context: Any) -> Any:
        self.context = context
        engines.append(self)
        if sum(engine.model == self.model for engine in engines) <= self.refuses:
            raise ConnectionRefusedError("the server is not there")
        return await EchoEngine.start(self, context)

    async def stop(self) -> None:
        await EchoEngine.stop(self)
        while self.hangs:
            await asyncio.sleep(0.01)

    def controls(self) -> Mapping[str, Any]:
        async def greet(arguments: Any) -> str:
            return "hello"

        return {"greet": greet}

    def problems(self) -> Mapping[str, str]:
        return {"server": "it is slow"} if self.delay else {}

    def metrics(self) -> bytes:
        return b"# TYPE dynamo_frontend_workers gauge\ndynamo_frontend_workers{model=\"far\"} 7\n" if self.model != "mute" else b"{ no metrics"


@pytest.fixture
def plugins() -> Plugins:
    engines.clear()
    here = types.ModuleType("acme_inside")
    here.Fickle = Fickle  # type: ignore[attr-defined]
    sys.modules["acme_inside"] = here
    plugins = Plugins.load()
    plugins.components = {**plugins.components, ("engine", "fickle"): Component("engine", "fickle", "acme_inside:Fickle", Plugin("acme"))}
    return plugins


@attrs.define
class Gateway:
    runtime: Runtime
    catalog: FleetCatalog
    registry: ProcessRegistry

    def ready(self) -> dict[str, int]:
        return {name: sum(worker["proven"] for worker in model["workers"]) for name, model in self.catalog.status()["models"].items()}

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)

    async def ask(self, model: str = "echo", tokens: int = 4) -> list[int]:
        generation = await self.catalog.get(model).start(Request(id=f"r{next(_names)}", model=model, token_ids=[97, 98], stops=Stops(max_tokens=tokens)),
                                                         TextOptions(), Context(f"r{next(_names)}"))
        ids: list[int] = []
        while deltas := await generation.read():
            ids += [token for delta in deltas for token in delta.token_ids]
        return ids

    def samples(self, family: str) -> dict[tuple[str, ...], float]:
        text = generate_latest(self.registry).decode()
        assert text.count(f"# TYPE {family} ") == 1
        found = next(found for found in text_string_to_metric_families(text) if found.name == family.removesuffix("_total"))
        return {tuple(sample.labels.get(label, "") for label in ("worker", "outcome", "model")): sample.value for sample in found.samples if sample.name == family}


@contextlib.asynccontextmanager
async def gateway(plugins: Plugins, *workers: Settings) -> AsyncGenerator[Gateway]:
    name = f"inside-{next(_names)}"
    config = Config(discovery=Use("memory", {"name": name}), request_plane=Use("in-process"), event_plane=Use("in-process", {"name": name}),
                    workers=tuple(attrs.evolve(worker, drain_timeout=0.1) for worker in workers))
    registry = process_registry()
    async with (
        Runtime.open(config, plugins) as runtime,
        FleetCatalog.open(runtime, registry) as catalog,
        workers_inside(config, plugins, registry) as inside,
    ):
        catalog.beside.append(inside)
        yield Gateway(runtime, catalog, registry)


def worker(engine: str = "fickle", count: int = 1, inside: bool = True, **options: Any) -> Settings:
    return Settings(engine=Use(engine, {"model": "echo", **options}), count=count, inside=inside)


async def test_each_of_several_has_a_lease_of_its_own_and_the_others_are_left_to_their_processes(plugins: Plugins) -> None:
    async with gateway(plugins, worker("echo", 3), worker("echo", 2, model="other"), worker("echo", inside=False)) as it:
        await it.until(lambda: it.ready() == {"echo": 3, "other": 2})
        ids = {member["id"] for model in it.catalog.status()["models"].values() for member in model["workers"]}
        assert len(ids) == 5
        assert it.catalog.problems() == {}
        assert await it.ask() == [97, 98, 97, 98]


async def test_an_engine_that_dies_is_replaced_and_the_others_serve_meanwhile(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    pause: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with gateway(plugins, worker(count=2)) as it:
        await it.until(lambda: it.ready() == {"echo": 2})
        first = engines[0]
        monkeypatch.setattr(Crashes, "pause", lambda self, lived: 1000.0 if not pause.done() else 0.01)
        first.context.died("out of luck")
        await it.until(lambda: it.ready() == {"echo": 1})
        assert it.catalog.problems() == {"backend-0 engine": "it has ended and is started again: out of luck"}
        for _ in range(4):
            assert await it.ask() == [97, 98, 97, 98]
        assert {worker for worker, _, _ in it.samples("dynamo_component_requests_total")} == {"backend-1"}, "nobody is there to count"


async def test_a_stream_of_an_engine_that_dies_goes_on_at_another(plugins: Plugins) -> None:
    async with gateway(plugins, worker(count=2, delay=0.01)) as it:
        await it.until(lambda: it.ready() == {"echo": 2})
        asking = asyncio.create_task(it.ask(tokens=40))
        await it.until(lambda: any(engine._pauses for engine in engines))
        await asyncio.sleep(0.1)
        next(engine for engine in engines if engine._pauses).context.died("out of luck")
        assert await asking == [97, 98] * 20


async def test_what_has_died_comes_back(plugins: Plugins) -> None:
    async with gateway(plugins, worker()) as it:
        await it.until(lambda: it.ready() == {"echo": 1})
        engines[0].context.died("out of luck")
        await it.until(lambda: len(engines) == 2)
        await it.until(lambda: it.ready() == {"echo": 1} and not it.catalog.problems())
        assert await it.ask() == [97, 98, 97, 98]


async def test_a_worker_that_does_not_start_is_named_and_tried_again_until_it_does(plugins: Plugins) -> None:
    async with gateway(plugins, worker("echo", model="well"), worker(refuses=2)) as it:
        await it.until(lambda: it.ready() == {"well": 1})
        why = "engine 'fickle' did not start: ConnectionRefusedError: the server is not there"
        await it.until(lambda: it.catalog.problems().get("backend-1.0 engine") == f"it has ended and is started again: {why}")
        await it.until(lambda: it.ready() == {"well": 1, "echo": 1})
        await it.until(lambda: not it.catalog.problems())


async def test_a_worker_that_waits_for_the_discovery_store_is_named(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(plugins) as it:
        answers = asyncio.Event()
        lease = MemoryDiscovery.lease

        async def late(self: MemoryDiscovery, ttl: float = 10.0) -> MemoryLease:
            await answers.wait()
            return await lease(self, ttl)

        monkeypatch.setattr(MemoryDiscovery, "lease", late)
        config = attrs.evolve(it.runtime.config, workers=(worker(),))
        async with workers_inside(config, plugins, it.registry) as inside:
            await asyncio.sleep(0)
            assert inside.problems() == {"backend-0 starting": "join the fleet"}
            answers.set()
            await it.until(lambda: it.ready() == {"echo": 1} and not inside.problems())


async def test_an_option_that_is_wrong_starts_nobody(plugins: Plugins) -> None:
    with pytest.raises(ConfigError, match="'dela'"):
        async with gateway(plugins, worker(), worker(dela=1)):
            raise AssertionError("it was entered")
    assert engines == []


async def test_series_carry_the_name_of_their_worker_and_families_of_one_name_are_one(plugins: Plugins) -> None:
    async with gateway(plugins, worker(count=2), worker(model="mute")) as it:
        await it.until(lambda: it.ready() == {"echo": 2, "mute": 1})
        for _ in range(8):
            await it.ask()
        await it.ask("mute")
        done = it.samples("dynamo_component_requests_total")
        assert done.pop(("backend-1.0", "done", "")) == 1
        assert sum(done.values()) == 8
        assert set(done) == {("backend-0.0", "done", ""), ("backend-0.1", "done", "")}
        workers = it.samples("dynamo_frontend_workers")
        assert workers["backend-0.0", "", "far"] == workers["backend-0.1", "", "far"] == 7, "what an engine exports itself"
        assert workers["", "", "echo"] == 2, "what the frontend exports under the same name"
        assert it.samples("dynamo_frontend_workers") == workers, "nothing adds up from scrape to scrape"
        strict = "".join(line for line in openmetrics_text(it.registry).decode().splitlines(True) if "dynamo_component_" in line or "dynamo_frontend_workers" in line)
        assert {family.name for family in openmetrics(f"{strict}# EOF\n")} >= {"dynamo_component_requests", "dynamo_frontend_workers"}


async def test_states_that_an_engine_names_are_states_of_the_gateway(plugins: Plugins) -> None:
    async with gateway(plugins, worker(delay=0.001)) as it:
        await it.until(lambda: it.ready() == {"echo": 1})
        assert it.catalog.problems() == {"backend-0 server": "it is slow"}


async def test_an_engine_that_never_ends_holds_nobody_up_for_ever(plugins: Plugins, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_LAST", 1.5)
    async with asyncio.timeout(30):
        async with gateway(plugins, worker(hangs=True), worker()) as it:
            await it.until(lambda: it.ready() == {"echo": 2})
    assert "worker backend-0.0 does not end" in caplog.text
    assert "worker backend-1.0 does not end" not in caplog.text


def test_pauses_grow_to_a_limit_and_begin_anew_after_a_good_while() -> None:
    crashes = Crashes()
    assert [crashes.pause(0.0) for _ in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST]
    for _ in range(5000):
        assert crashes.pause(STABLE) == LONGEST
    assert crashes.pause(STABLE + 1) == 0.5


def test_every_series_of_a_worker_is_in_the_table_and_every_row_is_a_series() -> None:
    registry = ProcessRegistry()
    WorkerMetrics(registry, namespace="dynamo", component="backend")
    exported = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    section = TABLE.read_text().split("## Workers", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == exported


async def test_operators_reach_the_actions_of_an_engine_inside(plugins: Plugins) -> None:
    async with gateway(plugins, worker(count=2)) as it:
        await it.until(lambda: it.ready() == {"echo": 2})
        for member in it.catalog.status()["models"]["echo"]["workers"]:
            (answer,) = await it.runtime.channels.call(member["address"], f"dynamo.backend.{names.CONTROL}", b'{"action": "greet"}', Context("c"), timeout=10)
            assert answer == b'"hello"'


async def test_a_pool_of_another_namespace_is_not_for_this_router(plugins: Plugins) -> None:
    async with gateway(plugins, worker(), attrs.evolve(worker("echo", model="pooled"), namespace="pool")) as it:
        await it.until(lambda: it.ready() == {"echo": 1})
        async with asyncio.timeout(20):
            while not await it.runtime.discovery.items(names.instances("pool")):
                await asyncio.sleep(0.01)
        assert it.ready() == {"echo": 1}
