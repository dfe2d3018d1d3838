"""The grounds on which faults are tried: each a fleet over other stores, planes, clocks or networks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import attrs

from benchmarks.chaos import network
from benchmarks.chaos.certificates import Certified
from benchmarks.chaos.stage import Shape, Stage, fresh, raised
from dynamo_core.plugins import Plugins

_FILE = '[discovery]\nuse = "file"\npath = "{path}"'
_STORES = {"etcd": ("etcd",), "nats": ("nats",), "nats-network": ("nats",), "certificates": ("etcd", "nats")}
"""What a field needs."""


def missing(field: str) -> str | None:
    """Why faults of this field cannot be tried here; `None`: they can."""
    if field in ("network", "nats-network") and (why := network.available()) is not None:
        return why
    if field == "clock":
        return None if shutil.which("cc") else "there is no C compiler for the clock that it needs"
    for store in _STORES.get(field, ()):
        if ("discovery", store) not in Plugins.load().components:
            return f"dynamo-{store} is not installed"
        server = {"etcd": "etcd", "nats": "nats-server"}[store]
        if not shutil.which(server, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"):
            return f"{server} is not installed"
    return None


@contextlib.asynccontextmanager
async def open_field(field: str, folder: Path, shape: Shape, seed: int) -> AsyncGenerator[Stage]:
    fresh(folder)
    async with contextlib.AsyncExitStack() as exits:
        environ: dict[str, str] = {}
        store: Any = folder / "store" / "discovery"
        planes = _FILE.format(path=store)
        link = None
        if field in ("network", "nats-network"):
            link = exits.enter_context(network.link(seed))
            shape = attrs.evolve(shape, remote=shape.workers // 2)
        if field in _STORES:
            store = await asyncio.to_thread(_servers, field, folder, link)
            exits.callback(store.kill)
            planes = store.planes
        elif field == "clock":
            clock = folder / "clock"
            clock.write_bytes(bytes(8))
            environ = {"LD_PRELOAD": str(await asyncio.to_thread(_compiled, folder)), "CHAOS_CLOCK": str(clock)}
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
    """Nodes of a store, and what can happen to them."""

    cluster: Any
    planes: str

    def kill(self) -> None:
        self.cluster.kill()

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

    async def stop(self, nodes: Sequence[Any], seconds: float) -> None:
        """`SIGSTOP`: connections stay open, and nobody answers."""
        try:
            for node in nodes:
                await asyncio.to_thread(node.pause)
            await asyncio.sleep(seconds)
        finally:
            for node in nodes:
                node.resume()

    async def wipe(self) -> None:
        await asyncio.to_thread(self.cluster.kill)
        await asyncio.to_thread(self.cluster.wipe)
        await asyncio.to_thread(self.cluster.start)


def _servers(field: str, folder: Path, link: network.Link | None) -> Servers | Certified:
    from dynamo_core.testing import servers

    if field == "certificates":
        return Certified.issued(folder)
    if field == "etcd":
        etcd = servers.EtcdCluster(folder / "etcd", nodes=3)
        return Servers(etcd, f'[discovery]\nuse = "etcd"\nendpoints = {_array(etcd.endpoints)}')
    nats = servers.NatsCluster(folder / "nats", nodes=1, host=link.near) if link else servers.NatsCluster(folder / "nats", nodes=3)
    return Servers(nats, _nats_planes(nats.servers, ("discovery", "event_plane", "request_plane")))


def _nats_planes(servers: Sequence[str], planes: Sequence[str], more: str = "") -> str:
    return "\n".join(f'[{plane}]\nuse = "nats"\nservers = {_array(servers)}\n{more}' for plane in planes)


def _array(texts: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{text}"' for text in texts) + "]"
