"""Real stacks of real processes, started by the command that users run."""

from __future__ import annotations

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

import attrs
import httpx
import pytest

ECHO = """
[frontend]
port = 0
drain_timeout = 5
[[workers]]
count = 2
engine = { use = "echo" }
"""


@attrs.define
class Running:
    """A stack under `dynamo up`."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]
    folder: Path
    model: str = ""

    def stop(self, signal_number: int = signal.SIGINT) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(timeout=60)

    def left_behind(self) -> list[Path]:
        """Files in the discovery directory."""
        return [file for file in (self.folder / "discovery").rglob("*") if file.is_file()]

    def children(self) -> list[int]:
        """Process ids of the roles."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False).stdout
        return [int(pid) for pid in found.split()]

    def health(self, client: Any = httpx) -> dict[str, Any]:
        return client.get(f"{self.url}/health").json()

    def workers(self) -> list[dict[str, Any]]:
        return [worker for model in self.health()["models"].values() for worker in model["workers"]]

    def until(self, condition: Callable[[], Any], timeout: float = 60.0) -> Any:
        end = time.monotonic() + timeout
        while not (found := condition()):
            assert time.monotonic() < end, "it did not come true; the last lines:\n" + "".join(self.lines[-20:])
            time.sleep(0.05)
        return found

    @property
    def text(self) -> str:
        return "".join(self.lines)


def start(folder: Path, stack: str, *arguments: str, timeout: float = 120.0) -> Running:
    """`dynamo up`, until it says that it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stack.toml"
    path.write_text(f'discovery = {{ use = "file", path = "{folder / "discovery"}" }}\n{stack}' if "discovery =" not in stack else stack)
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "up", str(path), *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines: list[str] = []
    ready = threading.Event()
    url: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"ready: .* behind (\S+)", line):
                url.append(found[1])
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    if not ready.wait(timeout) or not url:
        process.kill()
        raise AssertionError("the stack did not get ready:\n" + "".join(lines[-60:]))
    return Running(url[0], process, lines, folder)


@pytest.fixture(scope="session")
def start_stack() -> Callable[..., Running]:
    """`start_stack(folder, toml)`, for fixtures that share a stack between tests."""
    return start


@pytest.fixture(scope="session")
def echo_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A frontend and two echo workers."""
    running = start(tmp_path_factory.mktemp("echo-stack"), ECHO)
    yield running
    assert running.stop() == 0
    assert running.left_behind() == [], "a clean stop leaves no record behind"


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`up(toml)` starts a stack that ends with the test."""
    stacks: list[Running] = []

    def starting(stack: str, *arguments: str, **options: Any) -> Running:
        stacks.append(start(tmp_path / f"stack-{len(stacks)}", stack, *arguments, **options))
        return stacks[-1]

    yield starting
    for running in stacks:
        if running.process.poll() is None:
            running.stop()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def is_alive() -> Callable[[int], bool]:
    return alive


@pytest.fixture(scope="session", autouse=True)
def _no_proxy() -> None:
    os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")
