"""The grounds on which faults are tried: each a fleet over other stores, planes, clocks or networks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import attrs

from benchmarks.chaos import network
from benchmarks.chaos.stage import Shape, Stage, fresh, raised
from dynamo_core.plugins import Plugins

_FILE = '[discovery]\nuse = "file"\npath = "{path}"'


def missing(field: str) -> str | None:
    """Why faults of this field cannot be tried here; `None`: they can."""
    if field == "network":
        return network.available()
    if field == "clock":
        return None if shutil.which("cc") else "there is no C compiler for the clock that it needs"
    if field in ("etcd", "nats"):
        if not {("discovery", field), ("request_plane", field)} & Plugins.load().components.keys():
            return f"dynamo-{field} is not installed"
        server = {"etcd": "etcd", "nats": "nats-server"}[field]
        return None if shutil.which(server, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") else f"{server} is not installed"
    return None


@contextlib.asynccontextmanager
async def open_field(field: str, folder: Path, shape: Shape, seed: int) -> AsyncGenerator[Stage]:
    fresh(folder)
    async with contextlib.AsyncExitStack() as exits:
        environ: dict[str, str] = {}
        store: Any = folder / "store" / "discovery"
        planes = _FILE.format(path=store)
        link = None
        if field == "network":
            link = exits.enter_context(network.link(seed))
            shape = attrs.evolve(shape, remote=shape.workers // 2)
        elif field == "clock":
            clock = folder / "clock"
            clock.write_bytes(bytes(8))
            environ = {"LD_PRELOAD": str(await asyncio.to_thread(_compiled, folder)), "CHAOS_CLOCK": str(clock)}
        elif field in ("etcd", "nats"):
            store = await asyncio.to_thread(_servers, field, folder)
            exits.callback(store.cluster.kill)
            planes = store.planes
        if isinstance(store, Path):
            exits.enter_context(_small_disk(folder / "store"))
        yield await exits.enter_async_context(raised(folder, shape, planes, seed=seed, store=store, environ=environ, link=link))


@contextlib.contextmanager
def _small_disk(folder: Path):
    """A file system of 2 MiB where root may mount one, so that it can be filled; else a plain directory."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True).returncode == 0
    )
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _compiled(folder: Path) -> Path:
    """A library that moves the wall clock of whoever preloads it."""
    library = folder / "clock.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("clock.c")), "-ldl"], check=True)
    return library


@attrs.define
class Servers:
    """Three nodes of a store, and what can happen to them."""

    cluster: Any
    planes: str

    async def lose_leader(self, seconds: float) -> None:
        leader = getattr(self.cluster, "leader", lambda: 0)
        node = self.cluster.nodes[await asyncio.to_thread(leader)]
        await asyncio.to_thread(node.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.cluster.start)

    async def lose_all(self, seconds: float) -> None:
        await asyncio.to_thread(self.cluster.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(self.cluster.start)

    async def wipe(self) -> None:
        await asyncio.to_thread(self.cluster.kill)
        await asyncio.to_thread(self.cluster.wipe)
        await asyncio.to_thread(self.cluster.start)


def _servers(field: str, folder: Path) -> Servers:
    from dynamo_core.testing import servers

    if field == "etcd":
        etcd = servers.EtcdCluster(folder / "etcd", nodes=3)
        return Servers(etcd, f'[discovery]\nuse = "etcd"\nendpoints = {_array(etcd.endpoints)}')
    nats = servers.NatsCluster(folder / "nats", nodes=3)
    there = Plugins.load().components
    tables = [
        f'[{plane}]\nuse = "nats"\nservers = {_array(nats.servers)}' for plane in ("discovery", "event_plane", "request_plane") if (plane, "nats") in there
    ]
    if ("discovery", "nats") not in there:
        tables.append(_FILE.format(path=folder / "discovery"))
    return Servers(nats, "\n".join(tables))


def _array(texts: list[str]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in texts) + "]"
