"""From engine events on a ZeroMQ socket to the index: CPU of the consuming process, beside ai-dynamo's standalone indexer (Rust).

    raw     a process with the relay of four plain engines and the router: it reads what they publish, names the blocks and indexes them, as the indexer does
    edge    a router process follows the news of four workers, through event plane, feeds and provider; naming is the workers' work
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec
import zmq
from prometheus_client import CollectorRegistry

from benchmarks.kv_index_scenes import compared, hashes
from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Config, Kv, Secret, Use
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.engines.contract import BlocksStored
from dynamo_core.kv import blocks, chains, engine_events, hashing
from dynamo_core.kv.feed import KvFeed
from dynamo_core.pipeline.feeds import EventFeeds
from dynamo_core.pipeline.surroundings import Attachments
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import Worker
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.runtime import names
from dynamo_core.runtime.process import collect_rarely, new_event_loop
from dynamo_core.runtime.relay import KvRelay
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance
from dynamo_kv_router.store import Choice

WORKERS = 4
PER_EVENT = 32
PACE = 1024
"""Blocks every 10 ms."""


def cpu(pid: int) -> float:
    """Seconds, of all threads, to the nanosecond: `/proc/PID/stat` counts in hundredths of a second."""
    return sum(int(spent.read_text().split()[0]) for spent in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def settled(pid: int) -> float:
    """CPU time once the process has had nothing to do for a while."""
    last, since = cpu(pid), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.1)
        if (now := cpu(pid)) - last > 0.011:
            last, since = now, time.monotonic()
    return last


def idling(pid: int) -> float:
    """CPU seconds a second of a process that has nothing to do."""
    before, began = settled(pid), time.monotonic()
    time.sleep(3.0)
    return (cpu(pid) - before) / (time.monotonic() - began)


def events(blocks: int, size: int) -> list[tuple[int, BlocksStored]]:
    """(Worker, event): chains of 128 blocks, 32 an event."""
    rng, found = random.Random(3), list[tuple[int, BlocksStored]]()
    for i in range(blocks // 128):
        chain = hashes(i, 128)
        for start in range(0, 128, PER_EVENT):
            ids = [rng.randrange(128_000) for _ in range(PER_EVENT * size)]
            found.append((i % WORKERS, BlocksStored(chain[start : start + PER_EVENT], chain[start - 1] if start else None, ids)))
    return found


def publish(sockets: Sequence[zmq.Socket[bytes]], payloads: Sequence[tuple[int, bytes]]) -> None:
    numbers = [itertools.count() for _ in sockets]
    for i, (worker, payload) in enumerate(payloads):
        sockets[worker].send_multipart([b"kv-events", next(numbers[worker]).to_bytes(8, "big"), payload])
        if i % (PACE // PER_EVENT) == 0:
            time.sleep(0.01)


def as_vllm(event: BlocksStored, size: int) -> bytes:
    stored = {"type": "BlockStored", "block_hashes": event.hashes, "parent_block_hash": event.parent, "token_ids": event.token_ids, "block_size": size,
              "lora_id": None, "medium": "GPU", "lora_name": None, "extra_keys": [None] * PER_EVENT, "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    return msgspec.msgpack.encode([0.0, [stored], 0])


def over_zmq(command: Sequence[str], blocks: int, size: int) -> float:
    """Nanoseconds of CPU a block of whatever `command`, with its addresses, starts."""
    context = zmq.Context.instance()
    sockets = [context.socket(zmq.PUB) for _ in range(WORKERS)]
    for socket in sockets:
        socket.set(zmq.SNDHWM, 0)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
    payloads = [(worker, as_vllm(event, size)) for worker, event in events(blocks, size)]
    addresses = [f"tcp://127.0.0.1:{port}" for port in ports]
    named = ",".join(f"{i}={address}" for i, address in enumerate(addresses, 1))
    process = subprocess.Popen([part.format(addresses=named) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(4.0)
        idle = idling(process.pid)
        before, began = cpu(process.pid), time.monotonic()
        publish(sockets, payloads)
        after = settled(process.pid)
        return (after - before - idle * (time.monotonic() - began)) / blocks * 1e9
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        for socket in sockets:
            socket.close(0)


# ------------------------------------------------------------------ ours, in processes of their own


def _config(discovery: Use, store: Choice, **planes: Use) -> Config:
    router = RouterConfig(scorers=(Use("kv-overlap"),), facts=(Use("kv-index", {"store": store}),))
    return Config(discovery=discovery, kv=Kv(Secret("benchmark")), router=router, **planes)


def void(_: object) -> None: ...


def _card(size: int) -> ModelCard:
    return ModelCard(name="model", block_size=size, dp_size=WORKERS, kv_events=True)


async def _follow(runtime: Runtime, size: int) -> None:
    while not (found := await runtime.discovery.items(names.instances("dynamo"))):
        await asyncio.sleep(0.05)
    instance = msgspec.json.decode(next(iter(found.values())), type=Instance)
    router = Router("model", build_stack(runtime.config.router, runtime.plugins))
    EventFeeds(runtime).add(router, "backend")
    Attachments(runtime, CollectorRegistry()).follow(router, "backend")
    for rank in range(WORKERS):
        router.joined(Worker(instance.id, rank), instance, _card(size))
    await asyncio.Event().wait()


async def _raw(addresses: str, size: int, store: Choice) -> None:
    config = _config(Use("memory"), store, request_plane=Use("in-process"), event_plane=Use("in-process"))
    async with Runtime.open(config, Plugins.load()) as runtime, _relaying(runtime, size) as relay:
        for rank, pair in enumerate(addresses.split(",")):
            await KvFeed(rank, (pair.partition("=")[2], None), relay.reported).open()
        await _follow(runtime, size)


async def _edge(folder: str, size: int, store: Choice) -> None:
    async with Runtime.open(_config(Use("file", {"path": folder}), store), Plugins.load()) as runtime:
        await _follow(runtime, size)


@contextlib.asynccontextmanager
async def _relaying(runtime: Runtime, size: int) -> AsyncGenerator[KvRelay]:
    publisher = await runtime.publisher("backend", "kv")
    relay = KvRelay(_card(size), b"benchmark", lambda payload: void(publisher.publish(payload)))
    await runtime.serve("backend", {names.KV_STATE: relay.answer})
    await runtime.announce("backend", names.GENERATE, b"{}")
    try:
        yield relay
    finally:
        relay.close()


def consume(how: str, where: str, size: int, store: Choice) -> None:
    if store == "python":
        # A process without `dynamo-kv-native`.
        hashing.name_blocks, engine_events.pack_numbers, chains.Blocks = None, None, blocks.Blocks
    collect_rarely()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run((_raw if how == "raw" else _edge)(where, size, store))


async def _relay(blocks: int, size: int, store: Choice) -> tuple[float, float]:
    """Nanoseconds of CPU a block: of the router process, and of the relay in this one."""
    with tempfile.TemporaryDirectory() as folder:
        async with Runtime.open(_config(Use("file", {"path": folder}), store), Plugins.load()) as runtime, _relaying(runtime, size) as relay:
            stream = events(blocks, size)
            process = subprocess.Popen([sys.executable, "-m", "benchmarks.kv_index_pipe", "edge", folder, str(size), store])
            try:
                await asyncio.sleep(4.0)
                idle = await asyncio.to_thread(idling, process.pid)
                before, began, own = cpu(process.pid), time.monotonic(), time.process_time()
                for i, (worker, event) in enumerate(stream):
                    relay.reported([event], worker)
                    if i % (PACE // PER_EVENT) == 0:
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                own = time.process_time() - own
                after = await asyncio.to_thread(settled, process.pid)
                spent = after - before - idle * (time.monotonic() - began)
                return spent / blocks * 1e9, own / blocks * 1e9
            finally:
                process.kill()
                process.wait()


def pipelines(peer: str | None, stores: Sequence[Choice], quick: bool) -> None:
    print(f"\nfrom ZeroMQ to the index, CPU ns a block of the consuming process: {', '.join(stores)}{' / standalone indexer = ratios' if peer else ''}")
    print("32 blocks an event, 4 workers, 100k blocks a second; least of three runs")
    blocks, runs = (51_200, 1) if quick else (204_800, 3)
    for size in (16, 64):
        indexer = [peer or "", "-m", "dynamo.indexer", "--block-size", str(size), "--threads", "1", "--port", "18090", "--workers", "{addresses}"]
        raw, edge = ({store: float("inf") for store in stores} for _ in range(2))
        theirs = relay = float("inf")
        for _ in range(runs):
            if peer:
                theirs = min(theirs, over_zmq(indexer, blocks, size))
            for store in stores:
                ours = [sys.executable, "-m", "benchmarks.kv_index_pipe", "raw", "{addresses}", str(size), store]
                raw[store] = min(raw[store], over_zmq(ours, blocks, size))
                router, worker = asyncio.run(_relay(blocks, size, store))
                edge[store], relay = min(edge[store], router), min(relay, worker)
        print(f"blocks of {size:>2} tokens: raw events {compared(raw.values(), theirs)};  news of relays {compared(edge.values(), theirs)} "
              f"(and {relay:.0f} in the worker that feeds them)", flush=True)


if __name__ == "__main__":
    consume(sys.argv[1], sys.argv[2], int(sys.argv[3]), "python" if sys.argv[4] == "python" else "native")
