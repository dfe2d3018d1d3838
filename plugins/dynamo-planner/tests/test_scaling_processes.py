"""A frontend and workers as processes of this machine, scaled under load: what clients see of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.ending import ended
from dynamo_core.runtime.demand import held
from dynamo_planner.connectors.local import LocalConnector

pytestmark = pytest.mark.slow

STACK = """
lease_ttl = 2.0
discovery = {{ use = "file", path = "{folder}/discovery" }}
[frontend]
port = {port}
hold = {{ max_wait = 60 }}
[router]
use = "least-loaded"
[[workers]]
name = "backend"
count = 0
drain_timeout = 20
engine = {{ use = "sim", model = "sim", pace_ms = 5.0 }}
"""
PLANNER = """
[planner]
use = "standard"
metrics = {{ frontends = ["{url}"] }}
connector = {{ use = "local", models = ["sim"], gpus = {{ aggregated = 1 }} }}
tick = 0.5
interval = 1.0
propose = ["load"]
patience = 1.0
idle = 2.0
minimum = {{ aggregated = 0 }}
maximum = {{ aggregated = 2 }}
"""
TOKENS = 40


@attrs.define
class Site:
    file: Path
    url: str
    client: httpx.AsyncClient
    connector: LocalConnector
    served: int = 0
    failures: list[str] = attrs.field(factory=list)

    async def ask(self) -> None:
        """One streamed chat, which must be whole."""
        body = {"model": "sim", "stream": True, "max_tokens": TOKENS, "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "hi"}]}
        try:
            async with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                text = (await response.aread()).decode()
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            tokens = next((event["usage"]["completion_tokens"] for event in events if event.get("usage")), None)
            if response.status_code != 200 or tokens != TOKENS:
                self.failures.append(f"{response.status_code}: {tokens} tokens: {text[-300:]}")
            else:
                self.served += 1
        except httpx.HTTPError as e:
            self.failures.append(repr(e))

    @contextlib.asynccontextmanager
    async def load(self, clients: int) -> AsyncIterator[None]:
        """So many clients, each asking again and again. None may fail."""
        leaving = asyncio.Event()

        async def client() -> None:
            while not leaving.is_set():
                await self.ask()

        running = [asyncio.create_task(client()) for _ in range(clients)]
        try:
            yield
            leaving.set()
            async with asyncio.timeout(120):
                await asyncio.gather(*running)
        finally:
            await ended(*running)
        assert self.failures == []

    async def answers(self, more: int) -> None:
        """Wait for so many more answers."""
        enough = self.served + more
        async with asyncio.timeout(120):
            while self.served < enough:
                assert self.failures == []
                await asyncio.sleep(0.02)

    async def ready(self, count: int) -> None:
        """Until the frontend and the connector both see so many."""
        async with asyncio.timeout(120):
            while True:
                state = (await self.connector.observe())["aggregated"]
                workers: list[dict[str, Any]] = (await self.client.get("/health")).json()["models"].get("sim", {}).get("workers", [])
                if state.stable and state.ready == count and sum(worker["proven"] for worker in workers) == len(workers) == count:
                    return
                await asyncio.sleep(0.05)

    async def serving(self, since: float) -> set[str]:
        """Which workers got requests since that Unix time, by the frontend's own records."""
        decisions = (await self.client.get("/debug/decisions", params={"limit": 4000, "since": since})).json()["decisions"]
        return {decision["worker"] for decision in decisions if decision["worker"]}


@contextlib.contextmanager
def running(*arguments: str, until: str) -> Iterator[str]:
    """A `dynamo` command that says what `until` matches, and ends in order. Yields what the first group matched."""
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    found: list[str] = []
    lines: list[str] = []
    known = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if said := re.search(until, line):
                found.append(said[1])
                known.set()
        known.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert known.wait(60), f"{arguments} did not get ready:\n" + "".join(lines)
        assert found, f"{arguments} ended:\n" + "".join(lines)
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines[-40:])


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("scaling")
    file = folder / "stack.toml"
    file.write_text(STACK.format(folder=folder, port=0))
    with running("frontend", str(file), until=r"listening on (http://[\d.:]+)") as url:
        yield file, url


@pytest.fixture
async def site(frontend: tuple[Path, str]) -> AsyncIterator[Site]:
    file, url = frontend
    connector = LocalConnector(file=file, models=("sim",))
    await connector.start()
    async with httpx.AsyncClient(base_url=url, timeout=90) as client:
        try:
            yield Site(file, url, client, connector)
        finally:
            await connector.close()


async def test_a_cold_model_is_listed_and_its_first_request_is_answered_by_the_first_worker(site: Site) -> None:
    async with asyncio.timeout(120):
        while not (listed := (await site.client.get("/v1/models")).json()["data"]):
            await asyncio.sleep(0.05)
    assert [(model["id"], model["status"]) for model in listed] == [("sim", "cold")]
    assert (await site.client.get("/ready")).status_code == 200, "a load balancer must let the first request through"
    waiting = [asyncio.create_task(site.ask()) for _ in range(5)]
    async with FileDiscovery(site.file.parent / "discovery") as store, asyncio.timeout(120):
        while await held(store, "dynamo") != {"sim": 5}:
            await asyncio.sleep(0.02)
    assert 'dynamo_frontend_held_requests{model="sim"} 5.0' in (await site.client.get("/metrics")).text
    await site.connector.scale({"aggregated": 1}, reason="somebody waits")
    async with asyncio.timeout(120):
        await asyncio.gather(*waiting)
    assert (site.served, site.failures) == (5, [])


async def test_load_rises_and_falls_and_no_request_fails(site: Site) -> None:
    await site.connector.scale({"aggregated": 1}, reason="test")
    await site.ready(1)
    async with site.load(clients=6):
        await site.answers(6)
        await site.connector.scale({"aggregated": 3}, reason="the load rises")
        await site.ready(3)
        since = time.time()
        await site.answers(12)
        assert len(await site.serving(since)) == 3, "workers were added, and nobody asks them"
        await site.connector.scale({"aggregated": 1}, reason="the load falls")
        await site.ready(1)
        await site.answers(6)
    assert site.failures == []


async def test_a_fleet_goes_to_zero_under_requests_and_they_are_answered_when_it_returns(site: Site) -> None:
    await site.connector.scale({"aggregated": 1}, reason="test")
    await site.ready(1)
    async with site.load(clients=3):
        await site.answers(3)
        await site.connector.scale({"aggregated": 0}, reason="test")
        async with FileDiscovery(site.file.parent / "discovery") as store, asyncio.timeout(120):
            while await held(store, "dynamo") != {"sim": 3}:
                assert site.failures == []
                await asyncio.sleep(0.02)
        await site.connector.scale({"aggregated": 1}, reason="somebody waits")
        await site.answers(3)


async def test_a_worker_that_is_killed_costs_no_request_and_has_a_successor(site: Site) -> None:
    await site.connector.scale({"aggregated": 2}, reason="test")
    await site.ready(2)
    async with site.load(clients=4):
        await site.answers(4)
        victim = site.connector._replicas[0].child.process
        assert victim is not None
        os.kill(victim.pid, signal.SIGKILL)
        await site.answers(4)
        await site.ready(2)
        await site.answers(4)
    assert site.connector._replicas[0].child.restarts == 1


async def test_a_planner_wakes_a_cold_model_for_its_first_request_and_lets_it_sleep_again(frontend: tuple[Path, str]) -> None:
    stack, url = frontend
    file = stack.with_name("planner.toml")
    file.write_text((STACK + PLANNER).format(folder=stack.parent, url=url, port=0))
    with running("planner", "run", str(file), until=r"(planning)"):
        async with httpx.AsyncClient(base_url=url, timeout=90) as client:

            async def status() -> list[str]:
                return [model.get("status", "ready") for model in (await client.get("/v1/models")).json()["data"]]

            site = Site(file, url, client, LocalConnector(file=file))
            async def asleep() -> None:
                async with asyncio.timeout(120):
                    while await status() != ["cold"]:
                        await asyncio.sleep(0.1)

            await asleep()
            async with asyncio.timeout(120):
                await asyncio.gather(*(site.ask() for _ in range(3)))
            assert await status() == ["ready"]
            assert (site.served, site.failures) == (3, [])
            await asleep()


async def test_a_planner_that_decides_rarely_decides_at_once_when_somebody_waits(frontend: tuple[Path, str]) -> None:
    stack, url = frontend
    file = stack.with_name("rarely.toml")
    text = (STACK + PLANNER).format(folder=stack.parent, url=url, port=0)
    file.write_text(text.replace("tick = 0.5", 'tick = "1h"').replace("interval = 1.0", 'interval = "1h"'))
    with running("planner", "run", str(file), until=r"(first look)"):
        async with httpx.AsyncClient(base_url=url, timeout=110) as client:
            site = Site(file, url, client, LocalConnector(file=file))
            async with asyncio.timeout(120):
                while not (await client.get("/v1/models")).json()["data"]:
                    await asyncio.sleep(0.1)
                await site.ask()
            assert (site.served, site.failures) == (1, [])
