"""`dynamo planner run` beside a real frontend and real workers, and the commands that read what it wrote; `dynamo profile` against real workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynamo_core.cli import main
from dynamo_core.testing.servers import free_port
from dynamo_planner.performance.profile import load, read
from dynamo_planner.record import Decision, read_journal


class Command:
    """A `dynamo` command within this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = main(words)
        return code, *self._capsys.readouterr()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def spawn(*words: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{words[0]}.log").open("wb") as out:
            started.append(subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", *words], stdout=out, stderr=out, start_new_session=True, cwd=tmp_path,
                                            env={**os.environ, "DYNAMO__OBSERVABILITY__LOG_FORMAT": "console"}))
        return started[-1]

    yield spawn
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def until(found: Callable[[], Any], folder: Path, seconds: float = 90.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.log"))
        time.sleep(0.2)
    return value


def stack(folder: Path, port: int, planner: str, *, engine: str = "") -> Path:
    path = folder / "stack.toml"
    path.write_text(f"""
discovery = {{ use = "file", path = "{folder / "discovery"}" }}
[frontend]
port = {port}
[frontend.hold]
[[workers]]
count = 1
drain_timeout = 5
engine = {{ use = "sim", max_sequences = 4 {engine} }}
[planner]
use = "standard"
connector = {{ use = "local", gpus = {{ aggregated = 1 }}, models = ["sim"] }}
tick = 0.5
interval = 1.0
cold_start = 5.0
record = "{folder / "decisions.jsonl"}"
{planner}
[planner.metrics]
frontends = ["http://127.0.0.1:{port}"]
""")
    return path


def decisions(folder: Path) -> list[Decision]:
    return read_journal(folder / "decisions.jsonl") if (folder / "decisions.jsonl").exists() else []


def ready(folder: Path) -> int:
    last = decisions(folder)[-1:]
    return last[0].fleet["aggregated"].ready if last and last[0].fleet else 0


def ask(url: str, tokens: int) -> int:
    body = {"model": "sim", "prompt": "tell me more", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code


@pytest.mark.slow
def test_workers_come_with_the_load_and_go_with_it_and_every_change_is_explained(tmp_path: Path, processes, command: Command):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    path = stack(tmp_path, port, "gpus = 3\npatience = 1.5\nidle = 3.0\n")
    processes("frontend", str(path))
    planner = processes("planner", "run", str(path))
    until(lambda: _answers(port), tmp_path)

    codes: list[int] = []
    enough = threading.Event()

    def ask_on() -> None:
        while not enough.is_set():
            codes.append(ask(url, 100))

    crowd = [threading.Thread(target=ask_on) for _ in range(18)]
    for client in crowd:
        client.start()
    try:
        until(lambda: ready(tmp_path) == 3, tmp_path)
    finally:
        enough.set()
        for client in crowd:
            client.join()
    assert set(codes) == {200}

    until(lambda: any(d.targets.get("aggregated") == 0 for d in decisions(tmp_path)), tmp_path)
    until(lambda: decisions(tmp_path)[-1].fleet["aggregated"].ready == 0, tmp_path)
    assert ask(url, 5) == 200, "the frontend holds the request, and the planner wakes the fleet"

    status = re.findall(r"decisions at (http://[\d.:]+)", (tmp_path / "planner.log").read_text())[-1]
    assert 'dynamo_planner_decisions_total{action="scaled"}' in httpx.get(f"{status}/metrics").text
    asked = httpx.post(f"{status}/control/explain", json={}).json()
    assert asked["fleet"]["aggregated"]["gpus_per_replica"] == 1
    assert len(httpx.post(f"{status}/control/decisions", json={"last": 3}).json()) == 3
    assert httpx.post(f"{status}/control/explain", json={"number": 10**6}).status_code == 400

    scaled = [d for d in decisions(tmp_path) if d.action == "scaled"]
    up, down = next(d for d in scaled if d.targets["aggregated"] > 1), scaled[-2 if scaled[-1].targets["aggregated"] else -1]
    code, explained, _ = command("planner", "explain", str(path), "--number", str(up.number))
    assert code == 0
    assert "proposal  load: aggregated set" in explained
    assert "target    aggregated" in explained
    assert down.targets["aggregated"] == 0 or down.won("aggregated") is None
    assert "not recorded" in command("planner", "explain", str(path), "--number", "999999")[2]
    assert json.loads(command("planner", "what-if", str(path), "load=2x", "--json")[1])["targets"]["aggregated"] <= 3
    assert command("planner", "what-if", str(path), "load=much")[0] == 2
    assert command("planner", "report", str(path), "--out", str(tmp_path / "page.html"))[0] == 0
    assert "<svg" in (tmp_path / "page.html").read_text()

    planner.send_signal(signal.SIGTERM)
    assert planner.wait(60) == 0


def test_mistakes_of_the_operator_are_said_at_once_and_end_with_2(tmp_path: Path, command: Command):
    port = free_port()
    path = stack(tmp_path, port, 'gpus = 3\npropose = ["slaa", "load"]\npatiense = 3\n')
    code, _, said = command("planner", "run", str(path))
    assert code == 2
    assert "did you mean 'sla'" in said
    assert "patiense" in said
    assert "Traceback" not in said
    path.write_text("[frontend]\nport = 1\n")
    assert "has no [planner] table" in command("planner", "run", str(path))[2]
    code, _, said = command("planner", "explain", str(stack(tmp_path, port, "")))
    assert code == 2
    assert "`dynamo planner run` writes it" in said


@pytest.mark.slow
def test_a_worker_is_profiled_over_the_request_plane_and_over_http(tmp_path: Path, processes, command: Command):
    port = free_port()
    path = stack(tmp_path, port, "", engine=", speedup = 5.0, total_blocks = 2048")
    processes("frontend", str(path))
    processes("worker", str(path))
    until(lambda: _answers(port), tmp_path)

    grid = ["--inputs", "256,8192", "--contexts", "512,4096", "--concurrency", "1,4,64", "--output", "16", "--repeat", "2"]
    for name, words in (("plane", [str(path)]), ("url", ["--url", f"http://127.0.0.1:{port}", "--model", "sim"])):
        out = tmp_path / f"{name}.json"
        code, _, said = command("profile", *words, "--out", str(out), *grid)
        assert code == 0, said
        profile = read(out)
        assert [p.tokens for p in profile.prefill] == [256, 8192]
        assert profile.prefill[1].seconds > 2 * profile.prefill[0].seconds, "the engine is told to need 20 ms and 170 ms, five times faster"
        assert load(out).itl(4096, 4) > 0
        if name == "plane":
            assert profile.max_sequences == 4
            assert "the engine decodes 4 at once" in said
    code, _, said = command("profile", "plot", str(tmp_path / "plane.json"), "--out", str(tmp_path / "p.svg"))
    assert code == 0, said
    assert "<svg" in (tmp_path / "p.svg").read_text()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_predictors_are_replayed_on_a_recorded_series(tmp_path: Path, command: Command):
    series = tmp_path / "series.txt"
    series.write_text("# counts\n" + "\n".join(str(100 + i % 12) for i in range(60)) + "\n")
    code, said, _ = command("planner", "backtest", "--series", str(series), "--every", "9")
    assert code == 0
    assert all(name in said for name in ("kalman-trend", "ewma", "arima", "seasonal-naive"))
    series.write_text("1\nx\n")
    assert "series.txt:2" in command("planner", "backtest", "--series", str(series))[2]
