"""Real stacks of real processes, started by the command that users run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

ECHO = """
[discovery]
use = "file"
path = "{path}"
[frontend]
port = 0
drain_timeout = 5
[[workers]]
count = 2
engine = {{ use = "echo" }}
"""


@attrs.define
class Running:
    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


def start(path: Path, *arguments: str, timeout: float = 120.0) -> Running:
    """`dynamo up PATH`, until it says that it is ready."""
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
    return Running(url[0], process, lines)


@pytest.fixture(scope="session")
def echo_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A frontend and two echo workers."""
    folder = tmp_path_factory.mktemp("echo-stack")
    path = folder / "stack.toml"
    path.write_text(ECHO.format(path=folder / "discovery"))
    running = start(path)
    yield running
    assert running.stop() == 0
    left = [file for file in (folder / "discovery").rglob("*") if file.is_file()]
    assert left == [], "a clean stop leaves no record behind"
