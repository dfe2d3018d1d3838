"""Blocks in use, held against a model that knows sets only."""

from __future__ import annotations

import random

import pytest

from dynamo_core.routing.contract import Worker
from dynamo_kv_router.active import ActiveChains

W = [Worker(i) for i in range(5)]


def chain(rng: random.Random) -> list[int]:
    """Names of prefixes: equal beginnings give equal names."""
    tokens = [rng.choice("ab") for _ in range(rng.randrange(0, 9))]
    return [hash(("k", *tokens[: i + 1])) for i in range(len(tokens))]


@pytest.mark.parametrize("seed", range(30))
def test_counts_and_depths_are_those_of_sets_after_any_history(seed):
    rng, chains = random.Random(seed), ActiveChains()
    present: dict[Worker, list[list[int]]] = {}
    for _ in range(150):
        worker = rng.choice(W)
        match rng.randrange(8):
            case 0:
                chains.join(worker)
                present.setdefault(worker, [])
            case 1 if rng.random() < 0.2:
                chains.leave(worker)
                present.pop(worker, None)
            case 2 | 3 | 4:
                keys = chain(rng)
                chains.add(worker, keys)
                if worker in present:
                    present[worker].append(keys)
            case _:
                if present.get(worker):
                    chains.remove(worker, present[worker].pop(rng.randrange(len(present[worker]))))
        asked = chain(rng)
        held = {w: set().union(*map(set, c)) for w, c in present.items()}
        assert [chains.blocks(w) for w in W] == [len(held.get(w, ())) for w in W]
        depths = [next((i for i, key in enumerate(asked) if key not in held.get(w, ())), len(asked)) for w in W]
        assert chains.depths(asked, W) == depths
    for worker, all_ in present.items():
        for keys in all_:
            chains.remove(worker, keys)
    assert not chains._holders
