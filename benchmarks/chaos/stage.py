"""A fleet of real processes that can be hurt, and what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import httpx

from benchmarks.chaos.clients import Load

READY = 120.0
"""Seconds in which a fleet must have come up."""

CONFIG = """
lease_ttl = {ttl}
{planes}

[frontend]
port = {port}
processes = {frontends}
drain_timeout = 30

[frontend.admin]

[migration]
limit = 3
wait = 15

[router]
use = "least-loaded"

[observability]
log_format = "json"

[[workers]]
engine = {{ use = "sim", pace_ms = {pace_ms}, max_sequences = 2048, kv_events = false }}
max_requests = 4096
drain_timeout = 8
"""


@attrs.frozen
class Shape:
    """How large the fleet and the load are."""

    workers: int = 4
    frontends: int = 2
    streams: int = 200
    tokens: int = 60
    pace_ms: float = 50.0
    ttl: float = 10.0
    """Of the leases, in seconds."""
    usual: float = 6.0
    """Seconds of undisturbed load before a fault."""
    remote: int = 0
    """So many of the workers run behind the far end of a network."""


@attrs.define
class Role:
    """One process of the fleet, started again when it is asked for."""

    name: str
    arguments: Sequence[str]
    log: Path
    prefix: Sequence[str] = ()
    environ: Mapping[str, str] = attrs.field(factory=dict)
    process: asyncio.subprocess.Process | None = None
    starts: int = 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.prefix,
                sys.executable,
                "-m",
                "dynamo_core.cli",
                *self.arguments,
                stdout=out,
                stderr=out,
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "DYNAMO_SUPERVISED": str(os.getpid()), **self.environ},
                start_new_session=True,
            )
        self.starts += 1

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """`kill -9`, and gone when this returns."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.process.wait()

    async def end(self, timeout: float = 60.0) -> int:
        """Ask it to leave, and wait until it has."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
            try:
                return await asyncio.wait_for(self.process.wait(), timeout)
            except TimeoutError:
                await self.kill()
        return self.process.returncode or 0

    @property
    def resident(self) -> float:
        """MB."""
        with contextlib.suppress(OSError, StopIteration):
            line = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
            return int(line.split()[1]) * 1024 / 1e6
        return 0.0


@attrs.define
class Stage:
    folder: Path
    shape: Shape
    load: Load
    workers: list[Role]
    frontends: list[Role]
    admin: dict[str, str]
    """Where each frontend's operators' side is, by role name."""
    http: httpx.AsyncClient
    store: Any = None
    """What the faults of this store work on."""
    link: Any = None
    """The network to the remote workers."""

    @property
    def roles(self) -> list[Role]:
        return [*self.workers, *self.frontends]

    async def look(self, frontend: Role, path: str) -> Any:
        """:raises httpx.HTTPError: it does not answer."""
        response = await self.http.get(self.admin[frontend.name] + path)
        response.raise_for_status()
        return response.json()

    async def labels(self) -> dict[int, str]:
        """Label of each worker process that some frontend knows, by pid."""
        found: dict[int, str] = {}
        for frontend in self.frontends:
            with contextlib.suppress(httpx.HTTPError):
                for model in (await self.look(frontend, "/debug/fleet"))["models"].values():
                    found |= {worker["pid"]: worker["label"] for worker in model["workers"]}
        return found

    async def whole(self) -> str | None:
        """What is missing until every frontend has proven every worker and is healthy; `None`: nothing."""
        wanted = {role.pid for role in self.workers}
        for frontend in self.frontends:
            try:
                fleet = await self.look(frontend, "/debug/fleet")
            except httpx.HTTPError as e:
                return f"{frontend.name} does not answer: {type(e).__name__}"
            workers = [worker for model in fleet["models"].values() for worker in model["workers"]]
            proven = {worker["pid"] for worker in workers if worker["proven"]}
            if proven != wanted:
                return f"{frontend.name} has proven {len(proven & wanted)} of {len(wanted)} workers, and knows {len(proven - wanted)} that are gone"
            if fleet["problems"]:
                return f"{frontend.name} has problems: {fleet['problems']}"
        return None

    async def until_whole(self, timeout: float = READY) -> float:
        """Seconds until nothing is missing. :raises TimeoutError: with what is."""
        started, missing = time.monotonic(), None
        while time.monotonic() - started < timeout:
            if (missing := await self.whole()) is None:
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        raise TimeoutError(f"after {timeout:g} s: {missing}")

    async def booked(self) -> float:
        """Requests that the routers believe to be in progress."""
        total = 0.0
        for frontend in self.frontends:
            routers = await self.look(frontend, "/debug/routers")
            total += sum(worker["facts"]["bookings.in_flight"] for workers in routers.values() for worker in workers)
        return total

    async def decisions_for(self, labels: set[str], since: float) -> list[dict[str, Any]]:
        """Decisions after a Unix time that chose one of these workers."""
        found: list[dict[str, Any]] = []
        for frontend in self.frontends:
            with contextlib.suppress(httpx.HTTPError):
                listed = (await self.look(frontend, f"/debug/decisions?limit=5000&since={since}"))["decisions"]
                found += [decision for decision in listed if decision["worker"] in labels]
        return found


def free_ports(count: int) -> list[int]:
    """Outside the range from which outgoing connections take theirs, so that they stay free while a process is down."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


@contextlib.asynccontextmanager
async def raised(
    folder: Path, shape: Shape, planes: str, *, seed: int, store: Any = None, environ: Mapping[str, str] | None = None, link: Any = None
) -> AsyncGenerator[Stage]:
    """Start a fleet, learn its answers, and stop it at the end. :param planes: tables of the configuration that choose store and planes."""
    folder.mkdir(parents=True, exist_ok=True)
    port, *admin_ports = free_ports(1 + shape.frontends)
    path = folder / "stack.toml"
    path.write_text(CONFIG.format(ttl=shape.ttl, planes=planes, port=port, frontends=shape.frontends, pace_ms=shape.pace_ms))
    roles: list[Role] = []
    workers: list[Role] = []
    for i in range(shape.workers):
        far = i >= shape.workers - shape.remote
        more = ["--set", f"host={link.far}", "--set", "status.enabled=false"] if far else ["--set", f"host={link.near}"] if link else []
        workers.append(Role(f"worker-{i}", ["worker", str(path), *more], folder / f"worker-{i}.log", link.prefix if far else (), environ or {}))
    frontends = [
        Role(
            f"frontend-{i}",
            ["frontend", str(path), "--single", "--set", f"frontend.admin.port={admin_ports[i]}", *(["--set", f"host={link.near}"] if link else [])],
            folder / f"frontend-{i}.log",
            (),
            environ or {},
        )
        for i in range(shape.frontends)
    ]
    roles = [*workers, *frontends]
    load = Load(port, shape.streams, shape.tokens, seed)
    async with httpx.AsyncClient(timeout=3.0) as http:
        admin = {frontend.name: f"http://127.0.0.1:{port}" for frontend, port in zip(frontends, admin_ports, strict=True)}
        stage = Stage(folder, shape, load, workers, frontends, admin, http, store, link)
        try:
            for role in roles:
                await role.start()
            await stage.until_whole()
            await load.learn(24)
            yield stage
        except TimeoutError:
            for role in roles:
                print(f"--- {role.name}\n{role.log.read_text()[-1500:]}", flush=True)
            raise
        finally:
            for group in (frontends, workers):
                for role in group:
                    if role.process is not None and role.process.returncode is None:
                        with contextlib.suppress(ProcessLookupError):
                            role.send(signal.SIGCONT)
                await asyncio.gather(*(role.end(45) for role in group if role.process is not None))


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


Say = Callable[[str], None]
