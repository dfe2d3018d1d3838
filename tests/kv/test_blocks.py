"""Blocks in runs, against a plain model."""

from __future__ import annotations

import random
from array import array
from collections import defaultdict

import numpy as np
import pytest

from dynamo_core.kv.blocks import Blocks


class Model:
    """A dictionary of every block, and nothing clever."""

    def __init__(self) -> None:
        self.key: dict[int, int] = {}
        self.parent: dict[int, int | None] = {}
        """Also of those that are gone."""

    def children(self, h: int) -> set[int]:
        return {child for child in self.key if self.parent[child] == h}

    def ghosts(self) -> set[int]:
        return {parent for child in self.key if (parent := self.parent[child]) is not None and parent not in self.key}


def agree(blocks: Blocks, model: Model, known: set[int]) -> None:
    assert len(blocks) == len(model.key)
    below = defaultdict[int | None, set[int]](set)
    for child in model.key:
        below[model.parent[child]].add(child)
    for h in known:
        assert (h in blocks) == (h in model.key)
        if h in model.key:
            assert blocks.key(h) == model.key[h]
        children = blocks.children(h)
        assert len(children) == len(set(children))
        assert set(children) == below[h]
    without = set(list(model.key)[::3])
    assert sorted(array("Q", blocks.keys(without))) == sorted(key for h, key in model.key.items() if h not in without)


@pytest.mark.parametrize("seed", range(40))
def test_every_history_leaves_the_blocks_that_a_plain_model_has(seed: int, make_blocks: type[Blocks]) -> None:
    rng, blocks, model = random.Random(seed), make_blocks(), Model()
    known: set[int] = set()
    fresh = iter(range(1, 10**6))
    lengths = [1, 1, 2, 5, 64, 65, 200] if seed % 2 else [1, 1, 2, 3]
    for _ in range(60):
        here, gone = list(model.key), [h for h in known if h not in model.key]
        if rng.random() < 0.5 or not here:
            parent = rng.choice(here) if here and rng.random() < 0.8 else None
            hashes = array("Q", [next(fresh) for _ in range(rng.choice(lengths))])
            keys = np.array([h * 7 for h in hashes], np.uint64)
            assert blocks.store(hashes, parent, keys)
            for h, above in zip(hashes, [parent, *hashes], strict=False):
                model.key[h], model.parent[h] = h * 7, above
            known |= {*hashes}
        elif gone and rng.random() < 0.3:
            h = rng.choice(gone)
            parent = model.parent[h]
            if parent is None or parent in model.key:
                if h in model.ghosts():
                    assert not blocks.store(array("Q", [h]), parent, np.array([h * 7], np.uint64)), "a ghost is stored one by one"
                blocks.store_one(h, parent, h * 7)
                model.key[h] = h * 7
        else:
            start = rng.choice(here)
            for _ in range(rng.choice([1, 1, 3, 40])):
                left = blocks.children(start)
                key, children = blocks.drop(start)
                assert (key, set(children)) == (model.key.pop(start), model.children(start))
                assert set(left) == set(children)
                above = model.parent[start]
                if above is None or above not in model.key:
                    break
                start = above if rng.random() < 0.7 else rng.choice(list(model.key))
        agree(blocks, model, known)


def test_blocks_that_are_here_or_come_twice_change_nothing(make_blocks: type[Blocks]) -> None:
    blocks = make_blocks()
    assert blocks.store(array("Q", [1, 2]), None, np.array([10, 20], np.uint64))
    for hashes in ([2], [3, 1], [3, 3], [3, 4, 3], [*range(3, 100), 50]):
        assert not blocks.store(array("Q", hashes), 2, np.arange(len(hashes), dtype=np.uint64))
        assert (len(blocks), blocks.children(2)) == (2, [])
    with pytest.raises(KeyError):
        blocks.drop(3)
