"""What can go wrong, one at a time. Each is a coroutine that hurts a running fleet, and returns when the cause is gone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs

from benchmarks.chaos.clients import SlowReaders
from benchmarks.chaos.stage import Role, Stage

PATIENCE = 10.0
"""Seconds of silence on every way to every worker that requests in progress outlast: then they are asked, and given up."""
GRACE = 5.0
"""Seconds beyond the lease in which a worker that is gone must have left every router."""


@attrs.define
class Harm:
    """What a fault did, for the judgement."""

    gone: set[str] = attrs.field(factory=set)
    """Labels of workers that must not be chosen any more..."""
    gone_since: float = 0.0
    """...after this Unix time."""
    watch: float = 5.0
    """Seconds for which to go on watching once the fleet is whole: a lease that a fault has ended is missed later."""
    may_break: bool = False
    """Streams through a killed frontend end with it."""
    may_fail: bool = False
    """No healthy worker can be reached: requests wait for `migration.wait` and are then told so."""


@attrs.frozen
class Fault:
    name: str
    what: str
    run: Callable[[Stage, random.Random, Harm], Awaitable[None]]
    field: str = "file"
    """On which stage: file, network, clock, etcd, nats, nats-network, certificates."""
    short: bool = False
    """Part of the shortened suite."""


FAULTS: list[Fault] = []


def fault(name: str, what: str, *, field: str = "file", short: bool = False) -> Callable[[Callable[[Stage, random.Random, Harm], Awaitable[None]]], None]:
    def add(run: Callable[[Stage, random.Random, Harm], Awaitable[None]]) -> None:
        FAULTS.append(Fault(name, what, run, field, short))

    return add


async def _kill_workers(stage: Stage, victims: list[Role], harm: Harm, down: float) -> None:
    labels = await stage.labels()
    harm.gone = {labels[role.pid] for role in victims if role.pid in labels}
    for role in victims:
        await role.kill()
    harm.gone_since = time.time() + stage.shape.ttl + GRACE
    await asyncio.sleep(down)
    for role in victims:
        await role.start()


@fault("worker killed", "`kill -9` of one worker; started again 2 s later", short=True)
async def worker_killed(stage: Stage, dice: random.Random, harm: Harm) -> None:
    await _kill_workers(stage, [dice.choice(stage.workers)], harm, 2.0)


@fault("all workers but one killed", "`kill -9`, at once; started again 5 s later")
async def all_but_one_killed(stage: Stage, dice: random.Random, harm: Harm) -> None:
    await _kill_workers(stage, dice.sample(stage.workers, len(stage.workers) - 1), harm, 5.0)


@fault("frontend killed", "`kill -9` of one replica, with its router; started again 2 s later", short=True)
async def frontend_killed(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.may_break = True
    victim = dice.choice(stage.frontends)
    await victim.kill()
    await asyncio.sleep(2.0)
    await victim.start()


def _stop_for(seconds: float, kind: str) -> Callable[[Stage, random.Random, Harm], Awaitable[None]]:
    async def run(stage: Stage, dice: random.Random, harm: Harm) -> None:
        victim = dice.choice(stage.workers if kind == "worker" else stage.frontends)
        if kind == "worker" and seconds > stage.shape.ttl:
            labels = await stage.labels()
            harm.gone, harm.gone_since = {labels[victim.pid]}, time.time() + stage.shape.ttl + GRACE
        victim.send(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            victim.send(signal.SIGCONT)

    return run


for _seconds in (5, 15, 60):
    fault(f"worker stopped for {_seconds} s", "`SIGSTOP`, then `SIGCONT`", short=_seconds == 15)(_stop_for(_seconds, "worker"))
for _seconds in (5, 15, 60):
    fault(f"frontend stopped for {_seconds} s", "`SIGSTOP`, then `SIGCONT`")(_stop_for(_seconds, "frontend"))


@fault("workers restarted one after the other", "`SIGTERM`, start, wait until it serves; every worker")
async def workers_restarted(stage: Stage, dice: random.Random, harm: Harm) -> None:
    for role in dice.sample(stage.workers, len(stage.workers)):
        await role.end()
        await role.start()
        await stage.until_whole()


@fault("frontends restarted one after the other", "`SIGTERM`, start, wait until it serves; every frontend", short=True)
async def frontends_restarted(stage: Stage, dice: random.Random, harm: Harm) -> None:
    for role in dice.sample(stage.frontends, len(stage.frontends)):
        await role.end()
        await role.start()
        await stage.until_whole()


# ------------------------------------------------------------------ the file store


@fault("store directory gone", "the discovery directory is moved away for 30 s")
async def directory_gone(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    path: Path = stage.store
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        await asyncio.sleep(30.0)
    finally:
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)


@fault("store directory wiped", "every file in the discovery directory is deleted", short=True)
async def directory_wiped(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    for folder in ("keys", "leases", "tmp"):
        shutil.rmtree(stage.store / folder)


@fault("disk full", "the file system of the discovery directory has no byte left for 30 s, and one worker is killed meanwhile")
async def disk_full(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    litter = stage.store.parent / "litter"
    with litter.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    victim = dice.choice(stage.workers)
    try:
        labels = await stage.labels()
        await victim.kill()
        harm.gone, harm.gone_since = {labels[victim.pid]}, time.time() + stage.shape.ttl + GRACE
        await asyncio.sleep(30.0)
    finally:
        litter.unlink()
    if victim.process is None or victim.process.returncode is not None:
        await victim.start()


# ------------------------------------------------------------------ clients and clocks


@fault("slow readers", "100 clients ask for 20,000 tokens each and read nothing for 30 s")
async def slow_readers(stage: Stage, dice: random.Random, harm: Harm) -> None:
    async with SlowReaders(stage.load.port, 100, 20_000):
        await asyncio.sleep(30.0)


def _clock(seconds: int) -> Callable[[Stage, random.Random, Harm], Awaitable[None]]:
    async def run(stage: Stage, dice: random.Random, harm: Harm) -> None:
        for moved in (seconds, 0):
            with (stage.folder / "clock").open("r+b") as clock:
                clock.write(struct.pack("q", moved))
            if moved:
                await asyncio.sleep(15.0)

    return run


fault("clock an hour ahead", "the wall clock of every process jumps, and jumps back after 15 s", field="clock")(_clock(3600))
fault("clock an hour back", "the wall clock of every process jumps, and jumps back after 15 s", field="clock")(_clock(-3600))


# ------------------------------------------------------------------ the network to half of the workers


def _network(seconds: float, **state: float) -> Callable[[Stage, random.Random, Harm], Awaitable[None]]:
    async def run(stage: Stage, dice: random.Random, harm: Harm) -> None:
        stage.link.be(**state)
        try:
            await asyncio.sleep(seconds)
        finally:
            stage.link.be()

    return run


for _field, _name, _ends in (("network", "network", "the frontends"), ("nats-network", "network to NATS", "NATS with the frontends")):
    for _seconds in (5, 30):
        fault(f"{_name} cut for {_seconds} s", f"no packet passes between {_ends} and half of the workers", field=_field,
              short=(_field, _seconds) == ("nats-network", 5))(_network(_seconds, up=False))
    fault(f"{_name} slow", f"200 ms more in each direction between {_ends} and half of the workers, for 30 s", field=_field)(_network(30.0, delay=0.2))
    fault(f"{_name} loses packets", f"5 % of the packets between {_ends} and half of the workers, for 30 s", field=_field)(_network(30.0, loss=0.05))


# ------------------------------------------------------------------ stores and planes that are servers


async def _leader_lost(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    await stage.store.lose_leader(10.0)


async def _all_gone(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    await stage.store.lose_all(60.0)


async def _no_way(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.may_fail = True
    await _all_gone(stage, dice, harm)


async def _wiped(stage: Stage, dice: random.Random, harm: Harm) -> None:
    harm.watch = 1.5 * stage.shape.ttl + 5.0
    await stage.store.wipe()


def _servers_stopped(seconds: float, count: int) -> Callable[[Stage, random.Random, Harm], Awaitable[None]]:
    async def run(stage: Stage, dice: random.Random, harm: Harm) -> None:
        harm.may_fail = count == 3 and seconds > PATIENCE
        await stage.store.stop(dice.sample(stage.store.cluster.nodes, count), seconds)

    return run


async def _renewed(stage: Stage, dice: random.Random, harm: Harm) -> None:
    await stage.store.renew()


_THREE = "`kill -9` of the three servers; started again 60 s later"
for _field in ("etcd", "nats"):
    fault(f"{_field}: leader lost", "`kill -9` of the leader of three; started again 10 s later", field=_field)(_leader_lost)
    fault(f"{_field}: data wiped", "the three servers killed, their data deleted, started again", field=_field)(_wiped)
fault("etcd: all gone for a minute", _THREE, field="etcd")(_all_gone)
fault("nats: all gone for a minute", _THREE + "; no request can reach a worker meanwhile, since NATS is the request plane, too", field="nats")(_no_way)
for _seconds in (5, 15):
    fault(f"nats: a server stopped for {_seconds} s", "`SIGSTOP` of one of three, then `SIGCONT`", field="nats")(_servers_stopped(_seconds, 1))
    fault(f"nats: all stopped for {_seconds} s", "`SIGSTOP` of the three servers, then `SIGCONT`", field="nats", short=_seconds == 5)(_servers_stopped(_seconds, 3))
fault("certificates renewed", "etcd and NATS with mutual TLS: new certificates for servers and processes at the old places, then new connections; no process of the fleet starts anew",
      field="certificates", short=True)(_renewed)
