"""`dynamo up` of an engine over several nodes: some of its workers offer no model, and no frontend ever sees them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

PLUGIN = '''
import asyncio
from pathlib import Path

import attrs

from dynamo_core import hookimpl
from dynamo_core.engines.echo import EchoEngine


@attrs.define
class Part:
    """A part of an engine whose head is elsewhere. It starts once `gate` is there."""

    gate: Path
    echo: EchoEngine = attrs.field(factory=EchoEngine, init=False)

    async def start(self, context):
        context.offer(())
        context.progress("wait for the gate", None)
        while not self.gate.exists():
            await asyncio.sleep(0.05)
        return await self.echo.start(context)

    def generate(self, request, context):
        return self.echo.generate(request, context)

    async def stop(self):
        await self.echo.stop()


@hookimpl
def dynamo_register(registry):
    registry.engine("part", "part:Part", summary="a part of an engine")
'''


def installed(folder: Path) -> None:
    (folder / "part.py").write_text(PLUGIN)
    info = folder / "part-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: part\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dynamo]\npart = part\n")


@pytest.mark.parametrize("namespace", ["dynamo", "pool"])
def test_a_stack_is_ready_when_its_headless_workers_are_and_not_before(tmp_path: Path, namespace: str) -> None:
    installed(tmp_path)
    gate = tmp_path / "gate"
    stack = tmp_path / "stack.toml"
    stack.write_text(f"""
discovery = {{ use = "file", path = "{tmp_path}/discovery" }}
frontend = {{ port = 0 }}
[[workers]]
engine = "echo"
[[workers]]
name = "node1"
namespace = "{namespace}"
engine = {{ use = "part", gate = "{gate}" }}
""")
    up = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "up", str(stack), "--quiet", "--timeout", "90"], stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        assert up.stderr is not None
        waits = "1 of 2 workers ready (wait for the gate)" if namespace == "dynamo" else "1 workers of other namespaces are not ready"
        said: list[str] = []
        for line in up.stderr:
            said.append(line)
            if waits in line:
                gate.touch()
            if line.startswith("ready: ") or "not ready after" in line:
                break
        assert said[-1].startswith("ready: 1 workers behind http://"), said
        assert gate.exists()
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    finally:
        up.kill()
        up.wait()


def test_headless_workers_that_others_have_started_make_no_stack_ready(tmp_path: Path) -> None:
    installed(tmp_path)
    gate, stack, environment = tmp_path / "gate", tmp_path / "stack.toml", {**os.environ, "PYTHONPATH": str(tmp_path)}
    stack.write_text(f"""
discovery = {{ use = "file", path = "{tmp_path}/discovery" }}
frontend = {{ port = 0 }}
[[workers]]
engine = {{ use = "part", gate = "{gate}" }}
[[workers]]
name = "node1"
count = 0
engine = {{ use = "part", gate = "{tmp_path}" }}
""")
    other = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "worker", str(stack), "--index", "1"], stderr=subprocess.DEVNULL, env=environment)
    up = None
    try:
        wait_until_healthy(tmp_path / "discovery", "node1")
        up = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "up", str(stack), "--quiet", "--timeout", "90"], stderr=subprocess.PIPE, text=True, env=environment)
        assert up.stderr is not None
        for line in up.stderr:
            if "0 of 1 workers ready (wait for the gate)" in line:
                gate.touch()
            if line.startswith("ready: ") or "not ready after" in line:
                break
        assert gate.exists(), "it was ready before its own worker"
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    finally:
        for process in filter(None, (up, other)):
            process.kill()
            process.wait()


def wait_until_healthy(discovery: Path, name: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in discovery.rglob(f"v1%2Fstatus%2F*{name}*"):
            if path.is_file() and (url := re.search(rb"http://[\d.:]+", path.read_bytes())):
                try:
                    if httpx.get(f"{url[0].decode()}/health", timeout=5).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
        time.sleep(0.1)
    raise AssertionError(f"{name} never was healthy")
