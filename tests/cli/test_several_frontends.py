"""`dynamo frontend` with several processes: one scrape shows all of them, and a signal reaches all of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import attrs
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.frontend import siblings as module
from dynamo_core.frontend.siblings import Siblings, meeting_place
from dynamo_core.testing.servers import free_port

pytestmark = pytest.mark.slow
PROCESSES = 3
STACK = """
[discovery]
use = "file"
path = "{folder}/discovery"

[frontend]
port = {port}
processes = 3
admin = {{ port = {admin} }}

[router]
use = "least-loaded"

[[workers]]
engine = {{ use = "sim", pace_ms = 1 }}
"""


@attrs.define
class Running:
    path: Path
    log: Path
    supervisor: asyncio.subprocess.Process
    client: httpx.AsyncClient
    public: str
    admin: list[str]

    async def scrape(self, url: str) -> dict[str, dict[str, float]]:
        """Sums over everything but the process: by family's sample name, then by process."""
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families((await self.client.get(f"{url}/metrics")).text):
            for sample in family.samples:
                by_process = found.setdefault(sample.name, {})
                process = sample.labels.get("process", "")
                by_process[process] = by_process.get(process, 0.0) + sample.value
        return found

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.05)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncGenerator[Running]:
    port, admin = free_port(), free_port()
    path, log = tmp_path / "stack.toml", tmp_path / "log"
    path.write_text(STACK.format(folder=tmp_path, port=port, admin=admin))
    with log.open("wb") as out:
        processes = [
            await asyncio.create_subprocess_exec(sys.executable, "-m", "dynamo_core.cli", role, str(path), stdout=out, stderr=out, start_new_session=True)
            for role in ("worker", "frontend")
        ]
    try:
        async with httpx.AsyncClient(timeout=30.0, headers={"connection": "close"}) as client:
            urls = [f"http://127.0.0.1:{admin + i}" for i in range(PROCESSES)]
            found = Running(path, log, processes[1], client, f"http://127.0.0.1:{port}", urls)
            async with asyncio.timeout(90):
                for url in urls:
                    while not await _ready(client, url):
                        await asyncio.sleep(0.1)
            yield found
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in processes:
            try:
                async with asyncio.timeout(40):
                    await process.wait()
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)


async def _ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/ready")).status_code == 200
    except httpx.HTTPError:
        return False


async def test_one_scrape_shows_every_process_and_a_signal_reaches_all(running: Running) -> None:
    ids = list[str]()
    for _ in range(40):
        answer = await running.client.post(f"{running.public}/v1/completions", json={"model": "sim", "prompt": "hello", "max_tokens": 2})
        assert answer.status_code == 200
        ids.append(answer.headers["x-dynamo-decision"])
    assert len({id.split("-")[0] for id in ids}) > 1, "one process did everything"
    for number, id in enumerate(ids):
        url = running.admin[number % PROCESSES]
        assert (await running.client.get(f"{url}/debug/decisions/{id}")).json()["id"] == id
        assert (await running.client.get(f"{url}/debug/decisions/{id}-none")).status_code == 404
    everybody = {f"frontend-{i}" for i in range(PROCESSES)}
    for url in running.admin:
        metrics = await running.scrape(url)
        assert set(metrics["process_resident_memory_bytes"]) == everybody
        assert sum(metrics["dynamo_frontend_requests_total"].values()) == 40
        assert set(metrics["dynamo_frontend_inter_token_latency_seconds_count"]) == everybody, "our own kind of histogram as well"
        assert metrics["dynamo_frontend_processes"] == {"": PROCESSES}
    page = (await running.client.get(f"{running.admin[0]}/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})).text
    assert page.endswith("# EOF\n")
    families = re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(families) == len(set(families)), "one family, one place"

    running.path.write_text(running.path.read_text().replace("least-loaded", "round-robin"))
    running.supervisor.send_signal(signal.SIGHUP)
    await running.until(lambda: all(re.search(rf"^{name} \| .*routing by configuration 2", running.log.read_text(), re.MULTILINE) for name in everybody))

    one = next(int(line.split()[-1]) for line in await _pids(running.supervisor.pid))
    os.kill(one, signal.SIGKILL)
    await running.until(lambda: "starting again" in running.log.read_text())
    async with asyncio.timeout(60):
        while (await _processes(running)) != PROCESSES:
            await asyncio.sleep(0.2)


async def _pids(parent: int) -> list[str]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [pid for task in tasks for pid in task.read_text().split()]


async def _processes(running: Running) -> int:
    for url in running.admin:
        with contextlib.suppress(httpx.HTTPError):
            return len((await running.scrape(url))["process_resident_memory_bytes"])
    return 0


async def test_a_process_that_hangs_is_left_out_of_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client import CollectorRegistry, Counter

    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with meeting_place(["a", "b", "c"]) as variables:
        paths = [Path(variable[module.VARIABLE]) for variable in variables]
        registries = [CollectorRegistry(), CollectorRegistry()]
        for number, registry in enumerate(registries, 1):
            Counter("done", "", ["what"], registry=registry).labels("x").inc(number)
        silent = await asyncio.start_unix_server(lambda reader, writer: asyncio.sleep(60), paths[2])

        async def nothing(id: str) -> None: ...

        async def one(id: str) -> dict[str, str] | None:
            return {"id": id} if id == "d 1" else None

        async with Siblings(registries[0], paths[0], nothing) as here, Siblings(registries[1], paths[1], one):
            metrics = {metric.name: metric for metric in (await here.together()).collect()}
            assert await here.decision("d 1") == {"id": "d 1"}
            assert await here.decision("d 2") is None
            assert await here.decision("d\n1") is None
        silent.close()
    assert [(sample.labels, sample.value) for sample in metrics["done"].samples if sample.name == "done_total"] == [
        ({"what": "x", "process": "a"}, 1.0), ({"what": "x", "process": "b"}, 2.0)]
    assert metrics["dynamo_frontend_processes"].samples[0].value == 2
    assert not paths[0].parent.exists()
