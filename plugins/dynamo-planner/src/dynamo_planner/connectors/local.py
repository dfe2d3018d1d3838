"""`local`: workers as processes of this machine, started by the tables of a stack's file and drained by SIGTERM.

A worker process is what `dynamo worker FILE --index N` starts. Its lines go to the log under its name, it is started again when it dies, and it ends with
whoever owns the connector, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import msgspec
from attrs import validators as v

from dynamo_core.cli.supervisor import Child, Supervisor
from dynamo_core.config import build, load_with_plugins
from dynamo_core.config.schema import Config, Worker
from dynamo_core.discovery.contract import Discovery
from dynamo_core.errors import ConfigError, ConnectorUnavailable, Problem, ScaleRefused, StoreUnavailable
from dynamo_core.runtime import names
from dynamo_core.runtime.demand import ColdModel, ColdModels, cold_models
from dynamo_core.scaling import ROLES, RoleState
from dynamo_core.types import Instance

log = logging.getLogger("dynamo.planner.local")


@attrs.define(eq=False)
class _Replica:
    role: str
    child: Child
    devices: tuple[str, ...] = ()
    since: float = attrs.field(factory=time.monotonic)
    """When it was started, or last seen serving."""
    running: bool = False
    """It has what it needs, and the supervisor keeps it up."""


@attrs.define(eq=False)
class LocalConnector:
    """Options of `connector = { use = "local" }`. Starts as many workers as the file's `count` says; all of them end with it."""

    file: Path | None = None
    """The stack whose `[[workers]]` tables are started, one table a role. Default: $DYNAMO_CONFIG."""
    overrides: tuple[str, ...] = ()
    """Settings that override the file's for every worker: `"lease_ttl=2"`."""
    gpus: Mapping[str, int] = attrs.field(factory=dict[str, int], validator=v.deep_mapping(v.in_(ROLES), v.ge(0)))
    """GPUs of one worker, by role; 0 where it is left out."""
    devices: tuple[str, ...] = ()
    """The GPUs of this machine to share out: each worker sees its own through CUDA_VISIBLE_DEVICES, and starts when they are free."""
    models: tuple[str, ...] = ()
    """What these workers serve, for frontends that hold requests for it before the first worker has ever run. What has run is known by itself."""
    ready_timeout: float = attrs.field(default=600.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which a worker that does not serve counts as one that never will."""

    _config: Config = attrs.field(init=False, default=None, repr=False)
    _namespace: str = attrs.field(init=False, default="", repr=False)
    _tables: dict[str, int] = attrs.field(init=False, factory=dict[str, int], repr=False)
    """Index of the `[[workers]]` table of each role."""
    _discovery: Discovery | None = attrs.field(init=False, default=None, repr=False)
    _cold: ColdModels = attrs.field(init=False, default=None, repr=False)
    _offered: set[str] = attrs.field(init=False, factory=set[str], repr=False)
    """Workers whose models frontends were told of."""
    _supervisor: Supervisor = attrs.field(init=False, default=None, repr=False)
    _replicas: list[_Replica] = attrs.field(init=False, factory=list[_Replica], repr=False)
    """Those that are wanted, oldest first."""
    _retiring: dict[_Replica, asyncio.Task[None]] = attrs.field(init=False, factory=dict[_Replica, "asyncio.Task[None]"], repr=False)
    _numbers: dict[str, itertools.count[int]] = attrs.field(init=False, factory=dict[str, "itertools.count[int]"], repr=False)
    _exits: contextlib.AsyncExitStack | None = attrs.field(init=False, default=None, repr=False)

    # -------------------------------------------------------------- the contract

    async def start(self) -> None:
        config, plugins = load_with_plugins(self.file, overrides=self.overrides)
        self._config = config
        self._tables = _tables(config)
        spaces = {config.workers[table].namespace or config.namespace for table in self._tables.values()}
        if len(spaces) > 1:
            raise ConfigError(Problem(f"the [[workers]] tables are of several namespaces: {', '.join(sorted(spaces))}", config.workers[0].engine.where,
                                      remedy="a planner scales one pool: give each its own file"))
        (self._namespace,) = spaces
        if "memory" in (config.discovery.name, config.event_plane.name) or config.request_plane.name == "in-process":
            raise ConfigError(Problem("a worker is a process of its own, and processes cannot meet through memory", config.discovery.where,
                                      remedy='use discovery = "file", request_plane = "tcp" and event_plane = "zmq"'))
        counts = {role: config.workers[table].count for role, table in self._tables.items()}
        if (lacking := self._lacking(counts)) is not None:
            raise ConfigError(Problem(lacking, remedy="lower their count, or name more devices"))
        grace = max(config.workers[table].drain_timeout for table in self._tables.values())
        self._supervisor = Supervisor(_say, grace=grace)
        self._numbers = {role: itertools.count() for role in self._tables}
        async with contextlib.AsyncExitStack() as exits:
            discovery: Discovery = build(config.discovery, "discovery", plugins)
            self._discovery = await exits.enter_async_context(discovery)
            self._cold = ColdModels(discovery, self._namespace, config.lease_ttl)
            exits.push_async_callback(self._cold.close)
            await self._cold.offer([ColdModel(name=name) for name in self.models])
            self._exits = exits.pop_all()
        await self.scale(counts, reason="the file's count")

    async def observe(self) -> Mapping[str, RoleState]:
        if self._discovery is None:
            raise ConnectorUnavailable("the connector is not connected")
        try:
            records = await self._discovery.items(names.instances(self._namespace))
            serving = _serving(records, self._config.host)
            mine = {tail for tail, pid in serving.items() if any(_process(replica) == pid for replica in self._replicas)}
            if mine - self._offered:
                cards = await self._discovery.items(names.models(self._namespace))
                await self._cold.offer(cold_models(card for key, card in cards.items() if names.tail(key) in mine))
                self._offered = mine
            else:
                await self._cold.offer(())
        except StoreUnavailable as e:
            raise ConnectorUnavailable(f"who serves is unknown: {e}") from e
        pids = {*serving.values()}
        return {role: self._state(role, pids) for role in self._tables}

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        if self._discovery is None:
            raise ConnectorUnavailable("the connector is not connected")
        for role, count in targets.items():
            if role not in self._tables:
                raise ScaleRefused(f"this stack has no {role} workers; it has {', '.join(sorted(self._tables))}")
            if count < 0:
                raise ScaleRefused(f"there cannot be {count} {role} workers")
        if (lacking := self._lacking({role: targets.get(role, len(self._of(role))) for role in self._tables})) is not None:
            raise ScaleRefused(lacking)
        for role, count in sorted(targets.items(), key=lambda target: target[1] - len(self._of(target[0]))):  # what goes down goes first
            mine = self._of(role)
            if count != len(mine):
                log.info("%s: %d -> %d (%s)", role, len(mine), count, reason)
            for replica in sorted(mine, key=self._worth)[: max(0, len(mine) - count)]:
                self._retire(replica)
            for _ in range(count - len(mine)):
                self._replicas.append(self._new(role))
        self._fill()

    async def close(self) -> None:
        """Every worker drains and ends."""
        exits, self._exits, self._discovery = self._exits, None, None
        if exits is None:
            return
        async with exits:
            for replica in list(self._replicas):
                self._retire(replica)
            await asyncio.gather(*self._retiring.values())
            await self._supervisor.stop()

    # -------------------------------------------------------------- what runs

    def _of(self, role: str) -> list[_Replica]:
        return [replica for replica in self._replicas if replica.role == role]

    def _state(self, role: str, serving: set[int]) -> RoleState:
        now = time.monotonic()
        ready = starting = reducible = 0
        for replica in self._of(role):
            if _process(replica) in serving:
                replica.since = now
                ready += 1
                continue
            starting += 1
            reducible += self._lost(replica, now)
        draining = sum(replica.role == role for replica in self._retiring)
        return RoleState(ready + starting, ready, starting, draining, self.gpus.get(role, 0), stable=not (starting or draining), reducible=reducible)

    def _lost(self, replica: _Replica, now: float) -> bool:
        return replica.child.hopeless or (replica.running and now - replica.since > self.ready_timeout)

    def _worth(self, replica: _Replica) -> tuple[bool, bool, int]:
        """What is least missed sorts first: what never will serve, what does not run, the youngest."""
        lost = self._lost(replica, time.monotonic())
        return not lost, _process(replica) is not None, -self._replicas.index(replica)

    # -------------------------------------------------------------- processes

    def _new(self, role: str) -> _Replica:
        table = self._tables[role]
        shared = [*([str(self.file)] if self.file else []), *(f"--set={override}" for override in self.overrides)]
        # One port of the file cannot be that of several processes.
        arguments = ["worker", *shared, f"--index={table}", "--set=status.port=0"]
        return _Replica(role, Child(f"{role}-{next(self._numbers[role])}", arguments, rank=1))

    def _fill(self) -> None:
        """Start who waits, oldest first, as far as there are devices for them."""
        used = {device for replica in (*self._replicas, *self._retiring) for device in replica.devices}
        free = [device for device in self.devices if device not in used]
        for replica in self._replicas:
            if replica.running:
                continue
            if self.devices and (wanted := self.gpus.get(replica.role, 0)):
                if wanted > len(free):
                    return
                replica.devices, free = tuple(free[:wanted]), free[wanted:]
                replica.child.environment = {"CUDA_VISIBLE_DEVICES": ",".join(replica.devices)}
            replica.running, replica.since = True, time.monotonic()
            self._supervisor.start(replica.child)

    def _retire(self, replica: _Replica) -> None:
        self._replicas.remove(replica)
        if replica.running:
            self._retiring[replica] = asyncio.create_task(self._drain(replica), name=f"drain {replica.child.name}")

    async def _drain(self, replica: _Replica) -> None:
        try:
            await self._supervisor.retire(replica.child)
        finally:
            del self._retiring[replica]
            if self._discovery is not None:
                self._fill()

    def _lacking(self, counts: Mapping[str, int]) -> str | None:
        """What is wrong with so many workers, if they need more devices than there are."""
        wanted = sum(count * self.gpus.get(role, 0) for role, count in counts.items())
        if not self.devices or wanted <= len(self.devices):
            return None
        return f"{', '.join(f'{count} {role}' for role, count in counts.items())} workers need {wanted} GPUs, and this machine gives {len(self.devices)}"


def _say(name: str, line: str) -> None:
    """A worker's line: as it is when it is made for programs, under the worker's name otherwise."""
    if line.startswith("{"):
        sys.stderr.write(f"{line}\n")
    else:
        log.info("%s: %s", name, line)


def _process(replica: _Replica) -> int | None:
    """The process id of one that lives."""
    process = replica.child.process
    return process.pid if process is not None and process.returncode is None else None


def _serving(records: Mapping[str, bytes], host: str) -> dict[str, int]:
    """Process ids of those that generate here, by the tail of their key: other machines have processes of the same number."""
    found: dict[str, int] = {}
    for key, value in records.items():
        with contextlib.suppress(msgspec.MsgspecError):
            instance = msgspec.json.decode(value, type=Instance)
            if instance.endpoint == names.GENERATE and instance.host == host:
                found[names.tail(key)] = instance.pid
    return found


def _tables(config: Config) -> dict[str, int]:
    """Which table starts the workers of a role. :raises ConfigError: none does, or two do."""
    found: dict[str, int] = {}
    for index, worker in enumerate(config.workers):
        role = _role(worker)
        if role not in ROLES or worker.inside:
            continue
        if role in found:
            raise ConfigError(Problem(f"[[workers]] tables {found[role]} and {index} both have the role {role!r}, so which one to start is unclear",
                                      worker.engine.where, remedy="give the planner a file with one table for each role"))
        found[role] = index
    if not found:
        raise ConfigError(Problem("there is no [[workers]] table of processes, so there is nothing to start", remedy="name the stack as `file`"))
    return found


def _role(worker: Worker) -> str:
    said: Any = worker.role or worker.engine.options.get("role")
    return str(said or "aggregated")
