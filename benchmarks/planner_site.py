"""Where the planner is measured for real: a frontend, a planner and its workers as processes of this machine, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import httpx
import msgspec

from benchmarks import planner_oracle, procstat
from benchmarks.planner_client import MODEL, Answer
from benchmarks.planner_loads import Rush
from dynamo_core.testing.servers import free_port
from dynamo_planner.record import Decision, read_journal

ROOT = Path(__file__).parent.parent
READY = 90.0
"""Seconds that processes have to start, and to end."""
LOOK = 0.25
"""Seconds between two looks at the processes."""
START = 2.5
"""Seconds that a simulated engine takes to load, after its process has started."""
BLOCKS = 2048
"""Of an engine's cache. A small one, so that decoding needs replicas even though answers are short."""
Spawn = Callable[..., subprocess.Popen[bytes]]


@attrs.frozen
class Look:
    at: float
    """Unix time."""
    workers: int
    """Processes that live, from their start to their end."""
    cpu: Mapping[str, float]
    """Seconds of CPU so far: `frontend`, `planner` with its workers, `client`, and the whole `machine`."""


@attrs.frozen
class Seen:
    """One trial, from outside."""

    start: float
    """Unix time at which the requests began."""
    answers: Sequence[Answer]
    looks: Sequence[Look]
    decisions: Sequence[Decision]


def write_stack(folder: Path, port: int, counts: Mapping[str, int], planner: str = "") -> Path:
    """The file that all processes of a trial read. :param counts: workers at first, by role."""
    workers = "".join(f'''
[[workers]]
name = "{role}"
count = {count}
engine = {{ use = "sim", model = "{MODEL}", role = "{role}", startup_time = {START}, total_blocks = {BLOCKS} }}
''' for role, count in counts.items())
    file = folder / "stack.toml"
    file.write_text(f'''[discovery]
use = "file"
path = "{folder}/discovery"

[frontend]
port = {port}

[frontend.hold]

[router]
use = "least-loaded"
{workers}{planner}''')
    return file


@contextlib.contextmanager
def processes(folder: Path) -> Generator[Spawn]:
    """What starts processes whose output goes to a file each; they end in order, the last one first. The oracle is installed for them."""
    about = folder / "site/planner_oracle-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: planner-oracle\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[dynamo]\nplanner-oracle = {planner_oracle.__name__}\n")
    environment = {**os.environ, "PYTHONPATH": f"{about.parent}{os.pathsep}{ROOT}", "OPENBLAS_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []

    def spawn(module: str, *words: str) -> subprocess.Popen[bytes]:
        with (folder / f"{words[0] if module.endswith('cli') else 'client'}.log").open("ab") as out:
            running.append(subprocess.Popen([sys.executable, "-m", module, *words], stdout=out, stderr=out, env=environment, start_new_session=True))
        return running[-1]

    try:
        yield spawn
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(READY)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def until(true: Callable[[], bool], folder: Path) -> None:
    """:raises RuntimeError: it does not become true in time; with the end of every log."""
    end = time.monotonic() + READY
    while not true():
        if time.monotonic() > end:
            raise RuntimeError("\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.log")))
        time.sleep(0.1)


def profile(folder: Path, grid: Sequence[str]) -> Path:
    """What `dynamo profile` finds out about a worker of these stacks."""
    folder.mkdir(parents=True)
    out = folder / "profile.json"
    stack = write_stack(folder, free_port(), {"aggregated": 1})
    with processes(folder) as spawn:
        spawn("dynamo_core.cli", "worker", str(stack))
        measuring = spawn("dynamo_core.cli", "profile", str(stack), "--out", str(out), *grid)
        if measuring.wait(300) != 0:
            raise RuntimeError((folder / "profile.log").read_text())
    return out


def observe(folder: Path, counts: Mapping[str, int], planner: str, rush: Rush) -> Seen:
    """One trial: `rush` upon a fleet that the table `planner` scales. `{port}` and `{folder}` in it are filled in.

    :raises RuntimeError: a process does not start, or ends.
    """
    folder.mkdir(parents=True)
    port, journal = free_port(), folder / "decisions.jsonl"
    file = write_stack(folder, port, counts, planner.replace("{port}", str(port)).replace("{folder}", str(folder)))
    with processes(folder) as spawn:
        frontend = spawn("dynamo_core.cli", "frontend", str(file))
        until(partial(_answers, f"http://127.0.0.1:{port}/health"), folder)
        scaling = spawn("dynamo_core.cli", "planner", "run", str(file))
        until(lambda: _ready(journal, counts), folder)
        start = time.time() + 1.0
        (folder / "requests.json").write_bytes(msgspec.json.encode(rush.requests))
        (folder / "future.json").write_bytes(msgspec.json.encode(planner_oracle.Future(start, rush.rates.tolist(), rush.prompt, rush.output)))
        client = spawn("benchmarks.planner_client", f"--port={port}", f"--requests={folder}/requests.json", f"--start={start!r}", f"--out={folder}/answers.json")
        pids = {"frontend": frontend.pid, "planner": scaling.pid, "client": client.pid}
        looks: list[Look] = []
        enough = threading.Event()
        watching = threading.Thread(target=_watch, args=(pids, looks, enough))
        watching.start()
        try:
            code = client.wait(len(rush.rates) + 200)
        finally:
            enough.set()
            watching.join()
        if code != 0 or frontend.poll() is not None or scaling.poll() is not None:
            raise RuntimeError("a process has ended:\n" + "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in folder.glob("*.log")))
    return Seen(start, msgspec.json.decode((folder / "answers.json").read_bytes(), type=list[Answer]), looks, read_journal(journal))


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False).status_code in (200, 503)
    return False


def _ready(journal: Path, counts: Mapping[str, int]) -> bool:
    if not journal.exists() or not (past := read_journal(journal)):
        return False
    return all((seen := past[-1].fleet.get(role)) is not None and seen.ready >= count for role, count in counts.items())


def _watch(pids: Mapping[str, int], looks: list[Look], enough: threading.Event) -> None:
    while not enough.wait(LOOK):
        workers = sum(_is_worker(pid) for pid in procstat.tree([pids["planner"]]))
        cpu = {name: procstat.cpu([pid]) for name, pid in pids.items()}
        looks.append(Look(time.time(), workers, cpu | {"machine": procstat.busy()}))


def _is_worker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False
