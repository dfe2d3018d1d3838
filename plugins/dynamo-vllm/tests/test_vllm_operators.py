"""What operators do to real workers from outside: profile them, and read the metrics of several at once."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

PATIENCE = 240.0


@pytest.fixture(scope="module")
def stack(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two workers that share a directory of metrics; the first one may be profiled."""
    folder = tmp_path_factory.mktemp("operators")
    (folder / "metrics").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    args = 'max_model_len = 512, max_num_seqs = 8, kv_cache_memory_bytes = 33554432, block_size = 32, dtype = "float32"'
    profiler = f'profiler_config = {{ profiler = "torch", torch_profiler_dir = "{folder / "traces"}" }}'
    file = folder / "stack.toml"
    file.write_text(f"""
discovery = {{ use = "file", path = "{folder / "discovery"}" }}
[frontend]
port = {port}
[[workers]]
name = "profiled"
engine = {{ use = "vllm", model = "{tiny}", args = {{ {args}, {profiler} }} }}
[[workers]]
name = "plain"
engine = {{ use = "vllm", model = "{tiny}", args = {{ {args} }} }}
""")
    lines: list[str] = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics")}
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "up", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()), daemon=True).start()
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or len(fleet(url)) == 2, lines)
        status = {name: address(folder / "discovery", name) for name in ("profiled", "plain")}
        yield {"url": url, "folder": folder, "lines": lines, "status": status}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def fleet(url: str) -> list[dict[str, Any]]:
    with contextlib.suppress(httpx.HTTPError, KeyError):
        return [worker for worker in httpx.get(f"{url}/health", timeout=30).json()["models"]["tiny"]["workers"] if worker["proven"]]
    return []


def until(condition: Any, lines: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "\n".join(lines[-40:])
        time.sleep(0.1)


def address(discovery: Path, name: str) -> str:
    """Of a worker's status port, as discovery has it."""
    records = [path for path in discovery.rglob("*") if path.is_file() and "status" in str(path) and name in str(path)]
    found = {match for path in records for match in re.findall(rb"http://127\.0\.0\.1:\d+", path.read_bytes())}
    assert len(found) == 1, records
    return found.pop().decode()


def ask(stack: dict[str, Any], worker: str, tokens: int) -> None:
    """Have this worker generate so many tokens."""
    instance = next(int(found["id"], 16) for found in fleet(stack["url"]) if found["label"].startswith(f"{worker}-"))
    body = {"model": "tiny", "prompt": "Two and two make", "max_tokens": tokens, "ignore_eos": True, "dynamo": {"instance": instance}}
    httpx.post(f"{stack['url']}/v1/completions", json=body, timeout=120).raise_for_status()


def generated(stack: dict[str, Any], worker: str) -> float:
    text = httpx.get(f"{stack['status'][worker]}/metrics", timeout=30).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("vllm:generation_tokens_total{"))


def control(stack: dict[str, Any], worker: str, action: str) -> httpx.Response:
    return httpx.post(f"{stack['status'][worker]}/control/{action}", json={}, timeout=120)


def test_a_profile_that_is_started_and_stopped_leaves_a_trace(stack: dict[str, Any]) -> None:
    assert control(stack, "profiled", "start_profile").json() == {"profiling": True}
    ask(stack, "profiled", 8)
    assert control(stack, "profiled", "stop_profile").json() == {"profiling": False}
    traces = [path for path in (stack["folder"] / "traces").rglob("*trace*") if path.stat().st_size > 1000]
    assert traces, list((stack["folder"] / "traces").rglob("*"))
    ask(stack, "profiled", 8)


def test_a_worker_without_a_profiler_says_so_and_goes_on(stack: dict[str, Any]) -> None:
    answer = control(stack, "plain", "start_profile")
    assert answer.status_code == 400, answer.text
    assert "profiling is off" in answer.text
    ask(stack, "plain", 4)


def test_workers_that_share_a_directory_of_metrics_export_the_sum_of_all_processes(stack: dict[str, Any]) -> None:
    before = {name: generated(stack, name) for name in ("profiled", "plain")}
    assert before["profiled"] == before["plain"] > 0
    ask(stack, "profiled", 11)
    ask(stack, "plain", 31)
    until(lambda: {generated(stack, name) - before[name] for name in before} == {42.0}, stack["lines"])
    ours = httpx.get(f"{stack['status']['plain']}/metrics", timeout=30).text
    assert 'dynamo_component_requests_total' in ours
