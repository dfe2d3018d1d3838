"""The systems that are measured: what to start for each, which of the processes is under test, and how it is known to be ready."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import attrs

from benchmarks.scenarios import PACE_MS

MODEL = "bench"
READY = 120.0
"""Seconds that a system has to give its first answer."""


class NotReady(Exception):
    """The system did not answer, with the reason and the place of its log."""


@attrs.frozen
class Command:
    role: str
    """`frontend` is under test; `worker` stands for the engines."""
    argv: Sequence[str]
    env: Mapping[str, str] = {}
    settle: float = 0.0
    """Seconds before the next one is started."""


Target = Callable[[Path, Path, bool, int], list[Command]]
"""(work folder, model folder, paced, port) to what is to be started, in order."""


def _ours(http_server: str) -> Target:
    def make(work: Path, model: Path, paced: bool, port: int) -> list[Command]:
        stack = work / "stack.toml"
        timing = f"pace_ms = {PACE_MS}" if paced else "speedup = 0"
        # Neither system logs its requests (see DYN_LOG below).
        stack.write_text(
            f'[observability]\nlog_level = "error"\n\n[discovery]\nuse = "file"\npath = "{work}/discovery"\n\n[frontend]\nport = {port}\nhttp_server = "{http_server}"\n\n'
            f'[[workers]]\ncount = 2\nengine = {{ use = "sim", model = "{MODEL}", model_path = "{model}", {timing}, max_sequences = 1024 }}\n'
        )
        # As `pip install dynamo-core` gives it: an accelerator that happens to be installed must not flatter the figures.
        (work / "fastokens.py").write_text('raise ImportError("measured without optional extras")\n')
        env = {"PYTHONPATH": str(work)}
        dynamo = [sys.executable, "-m", "dynamo_core.cli"]
        worker = Command("worker", [*dynamo, "worker", str(stack), "--index=0"], env)
        return [worker, worker, Command("frontend", [*dynamo, "frontend", str(stack)], env)]

    return make


def _peer(python: Path) -> Target:
    """ai-dynamo's frontend with two of its own simulated workers, and the planes that correspond to ours."""

    def make(work: Path, model: Path, paced: bool, port: int) -> list[Command]:
        for folder in ("kv", "home"):
            (work / folder).mkdir()
        env = {
            "DYN_FILE_KV": f"{work}/kv", "HOME": f"{work}/home", "HF_HUB_OFFLINE": "1", "DYN_LOG": "error,request_span=error",
            "DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1", "DYN_EVENT_PLANE_HOST": "127.0.0.1",
        }
        planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
        # Its speed-up of 0 is real time; its decode step takes 6.6 ms, less the two ratios.
        speed, decode = ("20", f"{6.6 / 20 / PACE_MS:.4f}") if paced else ("1000000", "1")
        mocker = [
            str(python), "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL, "--speedup-ratio", speed,
            "--decode-speedup-ratio", decode, "--num-workers", "2", "--max-num-seqs", "1024", *planes,
        ]
        frontend = [str(python), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "round-robin", *planes]
        return [Command("worker", mocker, env, settle=4.0), Command("frontend", frontend, env)]

    return make


def _direct(work: Path, model: Path, paced: bool, port: int) -> list[Command]:
    """The load generator straight at prepared bytes: what the harness itself costs."""
    return [Command("frontend", [sys.executable, "-m", "benchmarks.backend", str(port), str(PACE_MS / 1000 if paced else 0)])]


TITLES = {"hypercorn": "ours, hypercorn", "uvicorn": "ours, uvicorn", "dynamo": "ai-dynamo 1.6.1", "direct": "floor of the harness"}
OURS = ("hypercorn", "uvicorn")
PEER = "dynamo"


def available(peers: Path | None) -> dict[str, Target]:
    """By name; `dynamo` only when its environment is there."""
    targets: dict[str, Target] = {"hypercorn": _ours("hypercorn"), "uvicorn": _ours("uvicorn"), "direct": _direct}
    if peers is not None and (python := peers / "dyn/bin/python").exists():
        targets[PEER] = _peer(python.absolute())
    return targets


@attrs.define
class Running:
    """A system that has answered a request."""

    port: int
    groups: dict[str, list[int]]
    """Process ids by role."""
    ready_seconds: float


@contextlib.contextmanager
def started(target: Target, work: Path, model: Path, *, paced: bool, patience: float = READY) -> Generator[Running]:
    """Start a system, wait for its first answer, and stop all of it afterwards. :raises NotReady: it gave none."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    port = _free_port()
    processes: list[subprocess.Popen[bytes]] = []
    groups: dict[str, list[int]] = {}
    begun = time.monotonic()
    try:
        for number, command in enumerate(target(work, model, paced, port)):
            with (work / f"{number}-{command.role}.log").open("wb") as log:
                process = subprocess.Popen(
                    command.argv, env={**os.environ, **command.env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            processes.append(process)
            groups.setdefault(command.role, []).append(process.pid)
            time.sleep(command.settle)
        _wait(port, processes, work, patience)
        yield Running(port, groups, time.monotonic() - begun)
    finally:
        _stop(processes)


def _wait(port: int, processes: Sequence[subprocess.Popen[bytes]], work: Path, patience: float) -> None:
    problem, deadline = "", time.monotonic() + patience
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2})
    good = 0
    while good < 4:  # both workers
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            problem = f"status {answer.status}: {answer.read()[:200]!r}"
            good += answer.status == 200
            connection.close()
        except OSError as e:
            problem = str(e)
        if any(process.poll() is not None for process in processes):
            raise NotReady(f"a process ended; the logs are in {work}")
        if time.monotonic() > deadline:
            raise NotReady(f"no answer within {patience:g} s ({problem}); the logs are in {work}")
        time.sleep(0.05)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in reversed(processes):
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: what it left behind
        process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
