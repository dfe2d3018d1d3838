"""What is seen: a running stack's series, directly and through a real Prometheus server, and its workers' own reports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from dynamo_core.config import Config, Secret, Use
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.testing.servers import Authority, Node, free_port
from dynamo_planner.config import Metrics
from dynamo_planner.contract import Load
from dynamo_planner.history import merged
from dynamo_planner.observe.frontends import FrontendLoad, http_client
from dynamo_planner.observe.samples import PRESENCE, START, Growth, Sample, SeveralProcesses
from dynamo_planner.observe.workers import WorkerReports
from dynamo_planner.planning import Missing
from dynamo_planner.stages.capacity import NEGLIGIBLE

KEY = "the operators' key"


@attrs.frozen
class Stack:
    url: str
    admin: str
    folder: Path

    def ask(self, count: int, *, tokens: int = 20) -> None:
        for i in range(count):
            body = {"model": "sim", "prompt": f"once upon a time there was number {i}", "max_tokens": tokens, "ignore_eos": True, "stream": i % 2 == 0}
            assert httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).status_code == 200


def start(folder: Path, lines: str, *, processes: int = 1) -> tuple[Stack, subprocess.Popen[bytes]]:
    port, admin = free_port(), free_port()
    (folder / "stack.toml").write_text(f"""
discovery = {{ use = "file", path = "{folder / "discovery"}" }}
[frontend]
port = {port}
processes = {processes}
admin = {{ port = {admin}, key = "env:PLANNER_TEST_KEY" }}
[[workers]]
count = 2
engine = {{ use = "sim", speedup = 20.0 }}
{lines}""")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "up", str(folder / "stack.toml")], stdout=log, stderr=log, start_new_session=True,
                                   env={**os.environ, "PLANNER_TEST_KEY": KEY})
    stack = Stack(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", folder)
    end = time.monotonic() + 90
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{stack.url}/ready").status_code == 200:
                return stack, process
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    running, process = start(tmp_path_factory.mktemp("stack"), "")
    yield running
    stop(process)


@contextlib.asynccontextmanager
async def reading(settings: Metrics, model: str | None = None) -> AsyncIterator[FrontendLoad]:
    async with http_client(settings) as client:
        yield FrontendLoad(settings, model, client)


async def until(found: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (value := await found()):
            await asyncio.sleep(0.1)
    return value


# ------------------------------------------------------------------ from the frontend itself


def with_key(url: str, **more: Any) -> Metrics:
    return Metrics(frontends=(url,), token=Secret(KEY), **more)


async def test_the_load_is_read_from_a_running_frontend(stack: Stack):
    async with reading(with_key(stack.admin), "sim") as source:
        assert await source.load(100.0) is None, "one look makes no rate"
        await asyncio.to_thread(stack.ask, 8)

        async def whole() -> Load | None:
            load = await source.load(source._last + 10.0)
            seen.append(load)
            return sum(part.rate * 10.0 for part in seen) == pytest.approx(8) and any(part.itl for part in seen)

        seen: list[Load] = []
        await until(whole)
        busy = next(part for part in seen if part.prompt_tokens)
        assert 5 < busy.prompt_tokens < 20
        assert busy.output_tokens == pytest.approx(20)
        assert 0 < busy.ttft < 10
        assert busy.in_progress == 0
        quiet = await source.load(source._last + 10.0)
        assert (quiet.rate, quiet.prompt_tokens, quiet.ttft) == (0.0, 0.0, None)


async def test_how_different_prompts_are_is_read_from_a_running_frontend(stack: Stack):
    def ask(tokens: int) -> None:
        body = {"model": "sim", "prompt": [100 + i % 800 for i in range(tokens)], "max_tokens": 2}
        assert httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).status_code == 200

    async def spread(lengths: list[int]) -> float:
        async with reading(with_key(stack.admin), "sim") as source:
            await source.load(100.0)
            await asyncio.gather(*(asyncio.to_thread(ask, tokens) for tokens in lengths))
            seen: list[Load] = []

            async def whole() -> bool:
                seen.append(await source.load(source._last + 10.0))
                return sum(part.rate * 10.0 for part in seen) == pytest.approx(len(lengths)) and any(part.prompt_tokens for part in seen)

            await until(whole)
            return merged(seen).prompt_spread

    assert await spread([3000] * 8) < NEGLIGIBLE
    assert await spread([200, 200, 200, 200, 200, 200, 200, 8000]) > 2.0


async def test_the_series_of_other_models_are_left_out(stack: Stack):
    async with reading(with_key(stack.admin), "another") as source:
        await source.load(1.0)
        await asyncio.to_thread(stack.ask, 2)
        assert (await source.load(2.0)).rate == 0.0


async def test_without_the_key_the_missing_part_is_the_load_and_the_remedy_is_named(stack: Stack):
    async with reading(Metrics(frontends=(stack.admin,))) as source:
        with pytest.raises(Missing, match=r"wants other credentials \(401\); set planner.metrics.token"):
            await source.load(1.0)


async def test_a_frontend_that_is_away_makes_the_load_unknown_and_not_smaller(stack: Stack):
    async with reading(with_key(stack.admin)) as alone:
        await alone.load(1.0)
    gone = f"http://127.0.0.1:{free_port()}"
    async with reading(attrs.evolve(with_key(stack.admin), frontends=(stack.admin, gone))) as source:
        with pytest.raises(Missing, match=f"the frontend {gone} does not answer"):
            await source.load(1.0)


async def test_an_address_that_is_no_frontend_is_told(stack: Stack):
    status = next(path for path in (stack.folder / "discovery").rglob("*status*backend*") if path.is_file())
    url = status.read_bytes().split(b"http://")[1].decode(errors="ignore")
    url = "http://" + "".join(c for c in url[:21] if c.isdigit() or c in ".:")
    async with reading(Metrics(frontends=(url,))) as source:
        with pytest.raises(Missing, match="is not of a frontend"):
            await source.load(1.0)


# ------------------------------------------------------------------ counters


def samples(value: float, started: float = 100.0, inflight: float = 1.0) -> list[Sample]:
    return [Sample("dynamo_frontend_requests_started_total", (("model", "m"),), value), Sample(START, (), started), Sample(PRESENCE, (), 0.0),
            Sample("dynamo_frontend_inflight_requests", (("model", "m"),), inflight)]


def test_counters_grow_from_the_first_look_on():
    growth = Growth()
    assert growth.since_last(samples(1000), 500.0) == {"dynamo_frontend_inflight_requests": 1.0}
    grown = growth.since_last([*samples(1010), Sample("dynamo_frontend_requests_started_total", (("model", "new"),), 3.0)], 510.0)
    assert grown["dynamo_frontend_requests_started_total"] == 13.0


def test_a_restarted_process_counts_from_zero():
    growth = Growth()
    growth.since_last(samples(1000), 500.0)
    assert growth.since_last(samples(7, started=505.0), 510.0)["dynamo_frontend_requests_started_total"] == 7.0
    assert growth.since_last(samples(1200, started=512.0), 520.0)["dynamo_frontend_requests_started_total"] == 1200.0


def test_a_process_that_was_not_there_at_the_look_before_is_counted_whole_if_it_is_young_and_not_at_all_if_it_is_old():
    assert Growth(500.0).since_last(samples(7, started=499.0), 510.0)["dynamo_frontend_requests_started_total"] == 7.0
    assert "dynamo_frontend_requests_started_total" not in Growth(500.0).since_last(samples(7, started=100.0), 510.0)


def test_processes_that_answer_in_turn_are_not_taken_for_restarts():
    growth = Growth()
    growth.since_last(samples(1000, started=100.0), 500.0)
    with pytest.raises(SeveralProcesses):
        growth.since_last(samples(900, started=103.0), 510.0)


@pytest.mark.slow
async def test_all_processes_of_a_frontend_are_counted(tmp_path: Path):
    running, process = await asyncio.to_thread(start, tmp_path, "", processes=2)
    try:
        async with reading(with_key(running.admin), "sim") as source:
            await source.load(1.0)
            await asyncio.to_thread(running.ask, 30, tokens=4)
            seen: list[Load] = []

            async def whole() -> bool:
                seen.append(await source.load(source._last + 1.0))
                return sum(part.rate for part in seen) >= 30

            await until(whole)
            assert sum(part.rate for part in seen) == 30
    finally:
        await asyncio.to_thread(stop, process)


# ------------------------------------------------------------------ workers


async def test_workers_report_by_role_and_one_that_is_idle_is_asked(stack: Stack):
    config = Config(discovery=Use("file", {"path": str(stack.folder / "discovery")}))
    async with Runtime.open(config, Plugins.load()) as runtime, WorkerReports.open(runtime, "sim", time.time) as workers:

        async def both() -> bool:
            return len(workers.reports(time.time())) == 2

        await until(both)
        reports = workers.reports(time.time())
        assert {report.role for report in reports} == {"aggregated"}
        assert len({report.worker for report in reports}) == 2
        assert workers.problems() == ()
        busy = asyncio.create_task(asyncio.to_thread(stack.ask, 1, tokens=2000))

        async def running() -> bool:
            return any(report.running for report in workers.reports(time.time()))

        await until(running)
        await busy
        assert workers.reports(time.time() + 3600) == (), "what was said an hour ago does not count"
        other = WorkerReports(runtime, "another model", time.time)
        for known in workers._workers.values():
            other.joined(known.instance, (await _card(runtime)))
        assert other.reports(time.time()) == ()


async def _card(runtime: Runtime):
    import msgspec

    from dynamo_core.cards import ModelCard
    from dynamo_core.runtime import names

    found = await runtime.discovery.items(names.models(runtime.config.namespace))
    return msgspec.json.decode(next(iter(found.values())), type=ModelCard)


# ------------------------------------------------------------------ through a Prometheus server

PASSWORD = "open sesame"
HASH = "$2b$04$VWCSEPIy3.u0kgc0UxYjru9LCYFUTRctcvxEiYDyILYsIq4qj9jTG"


@pytest.fixture
def prometheus(stack: Stack, tmp_path: Path) -> Iterator[tuple[Node, str, Authority]]:
    """A real server that scrapes the stack every second, and wants TLS and a password."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("needs the prometheus server in PATH: apt-get install prometheus")
    authority = Authority(tmp_path)
    cert, key = authority.issue("prometheus")
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "web.yml").write_text(f"tls_server_config: {{ cert_file: {cert}, key_file: {key} }}\nbasic_auth_users: {{ planner: {HASH} }}\n")
    (tmp_path / "prometheus.yml").write_text(f"""
global: {{ scrape_interval: 1s }}
scrape_configs:
  - job_name: dynamo
    authorization: {{ credentials_file: {tmp_path / "key"} }}
    static_configs: [{{ targets: ["{stack.admin.removeprefix("http://")}"], labels: {{ fleet: a }} }}]
""")
    node = Node([binary, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}",
                 f"--web.config.file={tmp_path / 'web.yml'}"], tmp_path / "data", tmp_path / "prometheus.log")
    node.spawn()
    yield node, f"https://{address}", authority
    node.kill()


@pytest.mark.slow
async def test_the_load_is_read_through_a_real_prometheus_server(stack: Stack, prometheus: tuple[Node, str, Authority]):
    node, url, authority = prometheus
    settings = Metrics(prometheus=url, selector='fleet="a"', user="planner", password=Secret(PASSWORD), ca=authority.cert, forget=2.0)
    async with reading(settings, "sim") as source:
        clock = [0.0]

        async def look() -> Load | str | None:
            clock[0] += 1.0
            try:
                return await source.load(clock[0])
            except Missing as e:
                return str(e)

        async def first() -> bool:
            return isinstance(await look(), Load)

        await until(first)
        await asyncio.to_thread(stack.ask, 12)
        seen: list[Load] = []

        async def all_of_it() -> bool:
            found = await look()
            seen.extend([found] if isinstance(found, Load) else [])
            return sum(load.rate for load in seen) >= 12 and any(load.itl for load in seen)

        await until(all_of_it)
        assert sum(load.rate for load in seen) == pytest.approx(12), "neither extrapolated nor lost"
        assert any(load.output_tokens == pytest.approx(20) for load in seen)

        node.kill()
        assert "does not answer" in str(await look())
        node.spawn()
        await until(first)

    for wrong, said in (({"password": Secret("guess")}, "wants other credentials"), ({"ca": None}, "does not answer: .*certificate"),
                        ({"selector": 'fleet="b"'}, "has no series")):
        async with reading(attrs.evolve(settings, **wrong)) as source:
            with pytest.raises(Missing, match=said):
                await source.load(1.0)
