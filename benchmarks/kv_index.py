"""The KV index beside ai-dynamo's: its `RadixTree` through its Python bindings, and its standalone indexer (Rust, from ZeroMQ to tree).

    python -m benchmarks.kv_index [--peer PYTHON] [--store python|native] [--quick]

Both stores of ours are measured, where `dynamo-kv-native` is installed. All sides run in turn on the same machine and the same data; a ratio
below 1 means that ours is cheaper. Without a Python that has ai-dynamo
(`--peer`, or `DYNAMO_PEER_PYTHON`) there are only our own figures. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv_index_pipe import pipelines
from benchmarks.kv_index_scenes import BLOCK, KINDS, NOISE, calls_for, compared, depths, hashes, lower_quartile, tokens
from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.engines.contract import BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv import Chains, Hasher, hashing
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Instance
from dynamo_kv_router.index import Index
from dynamo_kv_router.provider import KvIndex
from dynamo_kv_router.store import Choice, kind_of

SECRET = b"benchmark"


class Peer:
    """ai-dynamo in a process of its own."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("kv_index_peer.py")
        self._process = subprocess.Popen([python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, **task: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **task}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


# ------------------------------------------------------------------ lookup


@contextlib.contextmanager
def parts(store: Choice) -> Generator[None]:
    """Names blocks by the parts that go with a store: without `dynamo-kv-native`, those are plain, too."""
    compiled = hashing.name_blocks
    if store == "python":
        hashing.name_blocks = None
    try:
        yield
    finally:
        hashing.name_blocks = compiled


def lookup(store: Choice, workers: int, blocks: int, kind: str) -> float:
    """From tokens to the depth of each worker, in microseconds."""
    index, hasher, prompt = Index(store=store), Hasher(SECRET, BLOCK), tokens(1, blocks)
    fleet, keys = tuple(Worker(i) for i in range(workers)), hasher.keys(prompt)
    for worker, depth in zip(fleet, depths(kind, workers, blocks), strict=True):
        index.join(worker)
        index.add(worker, keys[:depth])
    for i in range(NOISE):
        index.add(fleet[i % workers], np.array(hashes(100 + i, 32), np.uint64))
    assert index.depths(hasher.keys(prompt), fleet).tolist() == depths(kind, workers, blocks)
    return lower_quartile(lambda: index.depths(hasher.keys(prompt), fleet), calls_for(blocks))


def lookups(peer: Peer | None, stores: Sequence[Choice], quick: bool) -> None:
    print(f"\nlookup, tokens to depth per worker, us: {', '.join(stores)}{' / RadixTree = ratios' if peer else ''}")
    print(f"{'workers':>8} {'blocks':>7}  " + "  ".join(f"{kind:>30}" for kind in KINDS))
    for blocks in (32, 512, 4096):
        for workers in (4, 64) if quick else (4, 64, 512, 1024):
            cells: list[str] = []
            for kind in KINDS:
                ours, theirs = dict.fromkeys(stores, float("inf")), float("inf")
                for _ in range(2):
                    for store in stores:
                        with parts(store):
                            ours[store] = min(ours[store], lookup(store, workers, blocks, kind))
                    if peer is not None:
                        theirs = min(theirs, peer("lookup", workers=workers, blocks=blocks, kind=kind))
                cells.append(f"{compared(ours.values(), theirs, 1):>30}")
            print(f"{workers:>8} {blocks:>7}  " + "  ".join(cells), flush=True)


# ------------------------------------------------------------------ changes


def change(store: Choice, blocks: int, total: int, workers: int) -> dict[str, float]:
    """Nanoseconds of CPU a block, in events of `blocks`: at the router by keys, and from the engine's events on (relay and index together)."""
    hasher, index, raw = Hasher(SECRET, BLOCK), Index(store=store), Index(store=store)
    fleet = [Worker(i) for i in range(workers)]
    chains = {worker: Chains(hasher) for worker in fleet}
    for worker in fleet:
        index.join(worker)
        raw.join(worker)
    length = max(32, blocks)
    keys: list[tuple[Worker, Any]] = []
    events: list[tuple[Worker, KvEvent]] = []
    gone: list[tuple[Worker, KvEvent]] = []
    for i in range(total // length):
        worker, names, prompt = fleet[i % workers], hashes(i, length), tokens(i, length)
        named = hasher.keys(prompt)
        for start in range(0, length, blocks):
            keys.append((worker, named[start : start + blocks].copy()))
            cut = names[start : start + blocks]
            events.append((worker, BlocksStored(cut, names[start - 1] if start else None, prompt[start * BLOCK : (start + blocks) * BLOCK])))
            gone.append((worker, BlocksRemoved(cut[::-1])))
    gone.reverse()

    def timed(run: Any) -> float:
        gc.collect()
        began = time.process_time()
        run()
        return (time.process_time() - began) / total * 1e9

    def feed(several: list[tuple[Worker, KvEvent]]) -> None:
        for worker, event in several:
            for each in chains[worker].apply([event]):
                raw.apply(worker, each)

    return {
        "stored": timed(lambda: [index.add(worker, part) for worker, part in keys]),
        "removed": timed(lambda: [index.remove(worker, part[::-1]) for worker, part in reversed(keys)]),
        "stored, from engine events": timed(lambda: feed(events)),
        "removed, from engine events": timed(lambda: feed(gone)),
    }


def changes(peer: Peer | None, stores: Sequence[Choice], quick: bool) -> None:
    print(f"\nchanges, CPU ns a block of 16 tokens, 64 workers: {', '.join(stores)}{' / RadixTree = ratios' if peer else ''}")
    print("RadixTree reads JSON that is ready and is not charged for hashing")
    for blocks in (1, 8, 32, 512):
        total = 20_000 if blocks == 1 or quick else 200_000
        ours: dict[Choice, list[dict[str, float]]] = {store: [] for store in stores}
        theirs: list[dict[str, float]] = []
        for _ in range(3):
            for store in stores:
                with parts(store):
                    ours[store].append(change(store, blocks, total, 64))
            if peer is not None:
                theirs.append(peer("change", blocks=blocks, total=total, workers=64))
        cells: list[str] = []
        for what in ours[stores[0]][0]:
            other = min((run[what.partition(",")[0]] for run in theirs), default=float("inf"))
            cells.append(f"{what} {compared([min(run[what] for run in runs) for runs in ours.values()], other)}")
        print(f"{blocks:>5} an event:  " + ";  ".join(cells), flush=True)


# ------------------------------------------------------------------ memory and pauses


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def memory(store: Choice, total: int, copies: int) -> None:
    """In a process of its own, so that the figure is the index's alone."""
    code = f"from benchmarks.kv_index import grow; grow({store!r}, {total}, {copies})"
    subprocess.run([os.sys.executable, "-c", code], check=True)  # pyright: ignore[reportAttributeAccessIssue]


def grow(store: Choice, total: int, copies: int) -> None:
    rng, index, workers = np.random.default_rng(1), Index(limit=max(8_000_000, 2 * total), store=store), [Worker(i) for i in range(64)]
    for worker in workers:
        index.join(worker)
    gc.collect()
    before, longest = resident(), 0
    for i in range(total // 32):
        keys = rng.integers(0, 2**64, size=32, dtype=np.uint64)
        for copy in range(copies):
            began = time.thread_time_ns()
            index.add(workers[(i + copy * 7) % 64], keys)
            longest = max(longest, time.thread_time_ns() - began)
    size = resident() - before
    began = time.thread_time_ns()
    index.drop_worker(workers[3])
    drop = time.thread_time_ns() - began
    sweep = 0
    for _ in range(5000):
        began = time.thread_time_ns()
        index.tidy()
        sweep = max(sweep, time.thread_time_ns() - began)
    print(f"{store:>8} {total:>10} blocks, {copies} holders each: {size / total:.0f} B a block; longest add of 32: {longest / 1e6:.2f} ms; "
          f"a worker leaves in {drop / 1e3:.0f} us, longest sweep {sweep / 1e6:.2f} ms", flush=True)


# ------------------------------------------------------------------ decisions


def decisions(store: Choice) -> None:
    print(f"\none decision, record kept: us of CPU, prompt of 512 blocks, system prompt everywhere and one owner; {store} store")
    plugins = Plugins.load()
    for scorers in ((Use("kv-overlap"),), (Use("kv-overlap"), Use("load", weight=0.5))):
        for size in (8, 64, 1024):
            router = Router("model", build_stack(RouterConfig(scorers=scorers, facts=(Use("kv-index", {"store": store}),)), plugins))
            provider: KvIndex = next(part.component for part in router.providers if part.use == "kv-index")
            prompt = tokens(1, 512)
            for worker, depth in enumerate(depths("system prompt", size, 512), 1):
                instance = Instance(id=worker, namespace="dynamo", component="backend", endpoint="generate", address="tcp://127.0.0.1:1")
                router.joined(Worker(worker), instance, ModelCard(name="model", max_sequences=10**6, total_blocks=10**6, kv_events=True))
                router.proven(Worker(worker))
                provider.feed(Worker(worker), [BlocksStored(hashes(1, depth), None, prompt[: depth * BLOCK])])
            best = 1e9
            for turn in range(5):
                requests = [RoutingRequest(f"{turn}-{i}", "model", list(prompt), len(prompt)) for i in range(50)]
                began = time.process_time()
                for request in requests:
                    router.booked(request, router.route(request).worker or Worker(1), 0)
                best = min(best, (time.process_time() - began) / 50 * 1e6)
                for request in requests:
                    for worker in router.workers:
                        router.finished(request.id, worker, "done")
            print(f"{size:>6} workers, {' + '.join(use.name for use in scorers):20} {best:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", default=os.environ.get("DYNAMO_PEER_PYTHON"), help="a Python that has ai-dynamo")
    parser.add_argument("--store", choices=["python", "native"], help="measure this store alone")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["lookups", "changes", "pipelines", "memory", "decisions"])
    arguments = parser.parse_args()
    peer = Peer(arguments.peer) if arguments.peer else None
    wanted = arguments.only
    stores: Sequence[Choice] = (arguments.store,) if arguments.store else ("python", "native") if kind_of("auto").name == "native" else ("python",)
    if wanted in (None, "decisions"):
        for store in stores:
            with parts(store):
                decisions(store)
    if wanted in (None, "lookups"):
        lookups(peer, stores, arguments.quick)
    if wanted in (None, "changes"):
        changes(peer, stores, arguments.quick)
    if peer is not None:
        peer.close()
    if wanted in (None, "pipelines"):
        pipelines(arguments.peer, stores, arguments.quick)
    if wanted in (None, "memory"):
        print("\nmemory and pauses (CPU time of the thread)")
        for total, copies in ((100_000, 1), (1_000_000, 1), (1_000_000, 4), *(() if arguments.quick else ((10_000_000, 1),))):
            for store in stores:
                memory(store, total, copies)


if __name__ == "__main__":
    main()
