"""The peer's side of the comparison: runs under a Python that has ai-dynamo, reads tasks as JSON lines and answers in kind."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dynamo._core import RadixTree, compute_block_hash_for_seq
from kv_index_scenes import BLOCK, NOISE, calls_for, depths, hashes, lower_quartile, tokens


def stored(number: int, names: list[int], parts: list[int], parent: int | None = None) -> bytes:
    blocks = [{"block_hash": name, "tokens_hash": part} for name, part in zip(names, parts, strict=True)]
    return json.dumps({"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}, "dp_rank": 0}).encode()


def lookup(workers: int, blocks: int, kind: str) -> float:
    tree, prompt = RadixTree(), tokens(1, blocks)
    parts, names = compute_block_hash_for_seq(prompt, BLOCK), hashes(2, blocks)
    for worker, depth in enumerate(depths(kind, workers, blocks)):
        if depth:
            tree.apply_event(worker, stored(worker, names[:depth], parts[:depth]))
    for i in range(NOISE):
        tree.apply_event(i % workers, stored(10_000 + i, hashes(100 + i, 32), hashes(-100 - i, 32)))
    found = tree.find_matches(compute_block_hash_for_seq(prompt, BLOCK)).scores
    assert [found.get((worker, 0), 0) for worker in range(workers)] == depths(kind, workers, blocks)
    return lower_quartile(lambda: tree.find_matches(compute_block_hash_for_seq(prompt, BLOCK)).scores, calls_for(blocks))


def change(blocks: int, total: int, workers: int) -> dict[str, float]:
    """Nanoseconds of CPU (all threads) a block, stored and then removed tail first, in events of `blocks`."""
    tree = RadixTree()
    chains = [hashes(i, max(32, blocks)) for i in range(total // max(32, blocks))]
    cuts = [(i, chain[start : start + blocks], chain[start - 1] if start else None) for i, chain in enumerate(chains) for start in range(0, len(chain), blocks)]
    events = [(i % workers, stored(i, names, [name ^ 1 for name in names], parent)) for i, names, parent in cuts]
    gone = [
        (i % workers, json.dumps({"event_id": i, "data": {"removed": {"block_hashes": names[::-1]}}, "dp_rank": 0}).encode()) for i, names, _ in reversed(cuts)
    ]
    answer: dict[str, float] = {}
    for what, several in (("stored", events), ("removed", gone)):
        began = time.process_time()
        for worker, event in several:
            tree.apply_event(worker, event)
        tree.find_matches([1])
        answer[what] = (time.process_time() - began) / total * 1e9
    return answer


if __name__ == "__main__":
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps({"lookup": lookup, "change": change}[task.pop("do")](**task)), flush=True)
