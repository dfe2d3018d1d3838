"""The connector `local`: the kit, over real worker processes of simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo_core.errors import ConfigError, ConnectorUnavailable, ScaleRefused
from dynamo_core.runtime import names
from dynamo_planner.connectors.kit import ConnectorContract
from dynamo_planner.connectors.local import LocalConnector

STACK = """
lease_ttl = 2.0
discovery = {{ use = "file", path = "{folder}/discovery" }}
[[workers]]
name = "prefill"
count = {count}
drain_timeout = 5
engine = {{ use = "sim", role = "prefill" }}
[[workers]]
name = "decode"
count = {count}
drain_timeout = 5
engine = {{ use = "sim", role = "decode" }}
"""


def stack(folder: Path, count: int = 0) -> Path:
    file = folder / "stack.toml"
    file.write_text(STACK.format(folder=folder, count=count))
    return file


@pytest.fixture
async def connector(tmp_path: Path) -> AsyncIterator[LocalConnector]:
    connector = LocalConnector(file=stack(tmp_path), gpus={"prefill": 1, "decode": 1})
    await connector.start()
    yield connector
    await connector.close()


@pytest.mark.slow
class TestLocal(ConnectorContract):
    patience = 120.0

    async def kill(self, connector: LocalConnector, role: str) -> bool:
        os.kill(next(r.child.process.pid for r in connector._replicas if r.role == role and r.child.process), signal.SIGKILL)
        return True

    async def spoil(self, connector: LocalConnector, role: str) -> bool:
        """The file is what a worker reads when it starts: from now on its engine's name is wrong."""
        file = connector.file
        assert file is not None
        file.write_text(file.read_text().replace('use = "sim"', 'use = "smi"'))
        return True

    @contextlib.asynccontextmanager
    async def outage(self, connector: LocalConnector) -> AsyncIterator[None]:
        assert connector.file is not None
        folder = connector.file.with_name("discovery")
        away = folder.rename(folder.with_name("away"))
        folder.write_text("a file where the directory should be")
        try:
            yield
        finally:
            folder.unlink()
            away.rename(folder)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def settled(connector: LocalConnector, **ready: int) -> None:
    async with asyncio.timeout(120):
        while {role: state.ready for role, state in (await connector.observe()).items() if state.stable} != ready:
            await asyncio.sleep(0.05)


async def test_as_many_workers_start_as_the_file_counts_and_all_end_with_the_connector(tmp_path: Path) -> None:
    connector = LocalConnector(file=stack(tmp_path, count=1))
    await connector.start()
    await settled(connector, prefill=1, decode=1)
    pids = [r.child.process.pid for r in connector._replicas if r.child.process]
    await connector.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not [file for file in (tmp_path / "discovery").rglob("*") if "instances" in file.name], "a drained worker leaves no record behind"


@pytest.mark.slow
async def test_workers_see_their_own_devices_and_wait_for_those_that_are_in_use(tmp_path: Path) -> None:
    connector = LocalConnector(file=stack(tmp_path), gpus={"prefill": 1, "decode": 2}, devices=("0", "1", "2"))
    await connector.start()
    try:
        with pytest.raises(ScaleRefused, match="need 4 GPUs, and this machine gives 3"):
            await connector.scale({"prefill": 2, "decode": 1}, reason="test")
        await connector.scale({"prefill": 3}, reason="test")
        await settled(connector, prefill=3, decode=0)
        first = {r.child.name: r.child.environment["CUDA_VISIBLE_DEVICES"] for r in connector._replicas}
        assert sorted(first.values()) == ["0", "1", "2"]
        await connector.scale({"prefill": 1, "decode": 1}, reason="test")
        waiting = next(r for r in connector._replicas if r.role == "decode")
        assert not waiting.running, "it was started on devices that others hold"
        await settled(connector, prefill=1, decode=1)
        assert set(waiting.child.environment["CUDA_VISIBLE_DEVICES"].split(",")) == {"1", "2"}, "the oldest worker stays, with its device"
    finally:
        await connector.close()


async def test_a_worker_that_takes_too_long_is_reducible_and_goes_on_trying(tmp_path: Path) -> None:
    file = stack(tmp_path)
    file.write_text(file.read_text().replace('role = "decode"', 'role = "decode", startup_time = 300'))
    connector = LocalConnector(file=file, ready_timeout=0.5)
    await connector.start()
    try:
        await connector.scale({"decode": 1}, reason="test")
        assert (await connector.observe())["decode"].reducible == 0
        async with asyncio.timeout(120):
            while not (await connector.observe())["decode"].reducible:
                await asyncio.sleep(0.05)
        assert (await connector.observe())["decode"].starting == 1
    finally:
        await connector.close()


@pytest.mark.slow
async def test_a_worker_of_another_machine_with_the_same_process_id_is_not_ours(tmp_path: Path) -> None:
    connector = LocalConnector(file=stack(tmp_path))
    await connector.start()
    try:
        await connector.scale({"decode": 1}, reason="test")
        await settled(connector, prefill=0, decode=1)
        store = connector._discovery
        assert store is not None
        (key, record), = [(key, value) for key, value in (await store.items(names.instances("dynamo"))).items()]
        await store.put(key, record.replace(b"127.0.0.1", b"10.1.2.3"))
        assert (await connector.observe())["decode"].ready == 0
    finally:
        await connector.close()


@pytest.mark.parametrize(("change", "says"), [
    (('role = "prefill"', 'role = "decode"'), "tables 0 and 1 both have the role 'decode'"),
    (('use = "file"', 'use = "memory"'), "processes cannot meet through memory"),
])
async def test_a_stack_that_cannot_work_is_refused_at_the_start(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    file = stack(tmp_path)
    text = file.read_text().replace(*change)
    file.write_text(text.replace(f', path = "{tmp_path}/discovery"', "") if "memory" in text else text)
    with pytest.raises(ConfigError, match=says):
        await LocalConnector(file=file).start()


@pytest.mark.parametrize("workers", ["", "[[workers]]\ninside = true\n"])
async def test_a_file_without_workers_of_their_own_has_nothing_to_start(tmp_path: Path, workers: str) -> None:
    file = tmp_path / "stack.toml"
    file.write_text(f'discovery = {{ use = "file" }}\n{workers}')
    connector = LocalConnector(file=file)
    with pytest.raises(ConfigError, match="nothing to start"):
        await connector.start()
    with pytest.raises(ConnectorUnavailable):
        await connector.observe()


@pytest.mark.slow
async def test_workers_of_a_pool_are_looked_for_in_its_namespace(tmp_path: Path) -> None:
    file = stack(tmp_path)
    file.write_text(file.read_text().replace('name = "decode"', 'name = "decode"\nnamespace = "pool"'))
    with pytest.raises(ConfigError, match="several namespaces: dynamo, pool"):
        await LocalConnector(file=file).start()
    file.write_text(file.read_text().replace('name = "prefill"', 'name = "prefill"\nnamespace = "pool"'))
    connector = LocalConnector(file=file)
    await connector.start()
    try:
        await connector.scale({"decode": 1}, reason="test")
        await settled(connector, prefill=0, decode=1)
    finally:
        await connector.close()


@pytest.mark.slow
async def test_workers_end_with_a_planner_that_is_killed(tmp_path: Path) -> None:
    file = stack(tmp_path, count=1)
    script = f"""
import asyncio, pathlib
from dynamo_planner.connectors.local import LocalConnector

async def main():
    connector = LocalConnector(file=pathlib.Path({str(file)!r}))
    await connector.start()
    while True:
        if all(state.ready == 1 for state in (await connector.observe()).values()):
            print(*(r.child.process.pid for r in connector._replicas), flush=True)
        await asyncio.sleep(0.1)

asyncio.run(main())
"""
    planner = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    assert planner.stdout is not None
    async with asyncio.timeout(120):
        pids = [int(pid) for pid in (await planner.stdout.readline()).split()]
    assert len(pids) == 2
    planner.kill()
    async with asyncio.timeout(120):
        while any(map(lives, pids)):
            await asyncio.sleep(0.05)
        await planner.wait()
