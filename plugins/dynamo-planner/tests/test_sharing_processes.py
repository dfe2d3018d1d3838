"""A global planner as a process, and two planners' connectors with real workers on this machine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import attrs
import pytest

from dynamo_core.cli import main
from dynamo_core.config import Secret, Use
from dynamo_core.contracts.connector import ConnectorContract
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.errors import ScaleRefused
from dynamo_planner.connectors.shared import SharedConnector
from dynamo_planner.connectors.virtual import VirtualConnector

sys.path.insert(0, str(Path(__file__).parent))

from test_connector_virtual import acting

pytestmark = pytest.mark.slow

BUDGET = """
[planner]
use = "global"
gpus = {gpus}
port = 0
lease = "2s"
patience = "1m"

[planner.planners.chat]
token = "env:TEST_CHAT_TOKEN"
priority = 1

[planner.planners.batch]
token = "env:TEST_BATCH_TOKEN"
"""
STACK = """
namespace = "{name}"
lease_ttl = 2.0
discovery = {{ use = "file", path = "{folder}/discovery" }}
[[workers]]
count = 0
drain_timeout = 5
engine = {{ use = "sim" }}
"""
TOKENS = {"TEST_CHAT_TOKEN": "chat-" + "x" * 20, "TEST_BATCH_TOKEN": "batch-" + "y" * 20}


def serve(folder: Path, gpus: int) -> Iterator[str]:
    """`dynamo planner global`, until it listens; then its end, in order."""
    file = folder / "budget.toml"
    file.write_text(BUDGET.format(gpus=gpus))
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", "planner", "global", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, **TOKENS}, start_new_session=True)
    lines: list[str] = []
    found: list[str] = []
    known = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if url := re.search(r"listening on (http://[\d.:]+)", line):
                found.append(url[1])
                known.set()
        known.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        assert known.wait(60), "".join(lines)
        assert found, "".join(lines)
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "".join(lines)
    assert TOKENS["TEST_CHAT_TOKEN"] not in "".join(lines)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield from serve(tmp_path, gpus=3)


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("plenty"), gpus=100)


def local(folder: Path, url: str, name: str) -> SharedConnector:
    (folder / name).mkdir()
    file = folder / name / "stack.toml"
    file.write_text(STACK.format(name=name, folder=folder / name))
    return SharedConnector(url=url, token=Secret(TOKENS[f"TEST_{name.upper()}_TOKEN"]), every=0.2,
                           connector=Use("local", {"file": str(file), "gpus": {"aggregated": 1}}))


async def ready(connector: SharedConnector, count: int) -> None:
    async with asyncio.timeout(120):
        while True:
            state = (await connector.observe())["aggregated"]
            if state.stable and state.ready == count:
                return
            await asyncio.sleep(0.05)


async def grown(connector: SharedConnector, count: int) -> None:
    """Ask, as a planner does at every tick, until it is granted: a global planner that has just started learns first."""
    async with asyncio.timeout(120):
        while True:
            try:
                await connector.scale({"aggregated": count}, reason="test")
                return await ready(connector, count)
            except ScaleRefused:
                await asyncio.sleep(0.2)


async def test_workers_of_one_planner_start_when_those_of_another_have_drained(tmp_path: Path, url: str) -> None:
    chat, batch = local(tmp_path, url, "chat"), local(tmp_path, url, "batch")
    await chat.start()
    await batch.start()
    try:
        await grown(batch, 2)
        with pytest.raises(ScaleRefused, match="parked"):
            await chat.scale({"aggregated": 2}, reason="test")
        await batch.scale({"aggregated": 1}, reason="test")
        async with asyncio.timeout(120):
            while True:
                seen = [(await connector.observe())["aggregated"] for connector in (chat, batch)]
                assert sum(state.ready + state.starting + state.draining for state in seen) <= 3, f"more GPUs are used than the budget has: {seen}"
                if seen[0].stable and seen[0].ready == 2:
                    break
                await asyncio.sleep(0.02)
        await chat.close()  # as if it had died: its workers end with it, and nobody tells the global planner
        await grown(batch, 3)
    finally:
        await chat.close()
        await batch.close()


@attrs.define(eq=False)
class _Virtual(VirtualConnector):
    folder: Path = attrs.field(init=False)

    async def start(self) -> None:
        await self.follow(FileDiscovery(self.folder), "dynamo")


class TestShared(ConnectorContract):
    """A connector within a budget that has room for everything is as good as without."""

    poll = 0.02

    @pytest.fixture
    async def connector(self, plenty: str, tmp_path: Path) -> AsyncIterator[SharedConnector]:
        async with acting(tmp_path / "discovery") as self.actor:
            inner = _Virtual(gpus={"prefill": 1, "decode": 2}, ready_timeout=3.0)
            inner.folder = tmp_path / "discovery"
            connector = SharedConnector(url=plenty, token=Secret(TOKENS["TEST_CHAT_TOKEN"]), every=0.2)
            await connector.over(inner)
            async with asyncio.timeout(120):
                while True:
                    try:
                        await connector.scale({"prefill": 1, "decode": 0}, reason="the global planner has learned")
                        break
                    except ScaleRefused:
                        await asyncio.sleep(0.1)
            await connector.scale({"prefill": 0}, reason="test")
            yield connector
            await connector.close()

    async def kill(self, connector: SharedConnector, role: str) -> bool:
        self.actor.broken.add(role)  # or the successor may be there before anybody looks
        await self.actor.cluster.kill(self.actor.workers[role][0])
        return True

    async def heal(self, connector: SharedConnector, role: str) -> None:
        self.actor.broken.discard(role)

    async def spoil(self, connector: SharedConnector, role: str) -> bool:
        self.actor.broken.add(role)
        return True


def test_without_a_global_planner_in_the_file_the_command_says_what_to_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stack.toml"
    file.write_text("")
    assert main(["planner", "global", str(file)]) == 2
    said = "".join(capsys.readouterr())
    assert 'write [planner] use = "global"' in said
    assert "Traceback" not in said
