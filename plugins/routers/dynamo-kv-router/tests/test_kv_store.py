"""Both stores against a plain one, a set of slots for each key; and which of them is taken."""

from __future__ import annotations

import random
import sys
from collections import defaultdict

import numpy as np
import pytest

from dynamo_core.config import load_with_plugins
from dynamo_core.errors import ConfigError
from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.stack import build_stack
from dynamo_kv_router.index import Index
from dynamo_kv_router.provider import KvIndex
from dynamo_kv_router.store import Choice, Store, kind_of


class PlainLevel:
    def __init__(self) -> None:
        self.holders: defaultdict[int, set[int]] = defaultdict(set)

    def add(self, keys: Keys, slot: int) -> None:
        for key in keys.tolist():
            self.holders[key].add(slot)

    def remove(self, keys: Keys, slot: int) -> None:
        for key in keys.tolist():
            self.holders[key].discard(slot)

    def sweep(self, dead: set[int]) -> None:
        for holders in self.holders.values():
            holders -= dead

    def __len__(self) -> int:
        return sum(map(bool, self.holders.values()))


def mask(slots: set[int]) -> int:
    return sum(1 << slot for slot in slots)


def depths(stores: list[Store], keys: Keys, live: set[int], width: int) -> list[int]:
    found = np.zeros(width, np.int32)
    stores[0].depths(keys, tuple(stores[1:]), mask(live), found)
    return found.tolist()


def expected(levels: list[PlainLevel], keys: Keys, live: set[int], width: int) -> list[int]:
    answer = [0] * width
    left = set(live)
    for at, key in enumerate(keys.tolist()):
        here = left & set().union(*(level.holders[key] for level in levels))
        for slot in left - here:
            answer[slot] = at
        left = here
    for slot in left:
        answer[slot] = len(keys)
    return answer


def random_keys(rng: random.Random, count: int, bits: int = 64) -> Keys:
    return np.array([rng.getrandbits(bits) for _ in range(count)], np.uint64)


@pytest.mark.parametrize("width", [1, 3, 63, 64, 65, 200, 700])
@pytest.mark.parametrize("shards", [1, 8])
def test_ten_thousand_random_changes_leave_each_block_with_the_holders_that_the_plain_store_says(width: int, shards: int, store: Choice):
    """Blocks of any order: nothing here is a chain, so that each is asked for by itself."""
    rng = random.Random(width * shards)
    real, plain = kind_of(store).make(shards, 1 << 20), PlainLevel()
    pool = random_keys(rng, 400)
    pool[:40] = np.arange(40)  # Small numbers, which are neighbours in every table.
    for turn in range(10_000):
        keys = pool[rng.randrange(400) :][:: rng.choice([1, 1, 1, 3, -1])][: rng.choice([0, 1, 2, 7, 60])]
        slot, action = rng.randrange(width), rng.random()
        if action < 0.55:
            real.add(keys, slot)
            plain.add(keys, slot)
        elif action < 0.98:
            real.remove(keys, slot)
            plain.remove(keys, slot)
        else:
            dead = {rng.randrange(width) for _ in range(rng.randrange(5))}
            for shard in range(shards):
                real.sweep(shard, mask(dead))
            plain.sweep(dead)
        if turn % 2000 == 1999:
            live = {slot for slot in range(width) if rng.random() < 0.9}
            assert all(depths([real], pool[at : at + 1], live, width) == expected([plain], pool[at : at + 1], live, width) for at in range(len(pool)))
        assert turn % 100 or len(real) == len(plain)
    for shard in range(shards):
        real.sweep(shard, (1 << width) - 1)
    assert len(real) == 0


@pytest.mark.parametrize("seed", range(12))
def test_depths_over_several_levels_are_those_of_the_plain_store(seed: int, store: Choice):
    """Chains with a shared trunk; whoever holds a block of any level holds those before it at some level."""
    rng = random.Random(seed)
    width = rng.choice([2, 70, 530])
    levels, plain = [kind_of(store).make(4, 1 << 20) for _ in range(3)], [PlainLevel() for _ in range(3)]
    trunk = random_keys(rng, 300)
    chains = [np.concatenate([trunk[:cut], random_keys(rng, rng.randrange(1, 200))]) for cut in (0, 1, 5, 150, 300)]
    for slot in range(width):
        if rng.random() < 0.9:
            chain = rng.choice(chains)
            cuts = sorted(rng.randrange(len(chain) + 1) for _ in range(3))
            for level, (start, end) in zip(rng.sample(range(3), 3), zip([0, *cuts], cuts, strict=False), strict=True):
                levels[level].add(chain[start:end], slot)
                plain[level].add(chain[start:end], slot)
    live = {slot for slot in range(width) if rng.random() < 0.8}
    for chain in chains:
        for keys in (chain, chain[:1], chain[::2], np.concatenate([chain, random_keys(rng, 5)])):
            assert depths(levels, keys, live, width) == expected(plain, keys, live, width)
            assert depths(levels, keys, {0}, width) == expected(plain, keys, {0}, width)


@pytest.mark.parametrize("width", [1, 64, 300])
@pytest.mark.parametrize("blocks", [1, 2, 31, 32, 33, 700])
def test_every_slot_may_hold_another_length(width: int, blocks: int, store: Choice):
    rng = random.Random(width * blocks)
    real, keys = kind_of(store).make(16, 4096), random_keys(rng, blocks)
    held = [rng.randrange(blocks + 1) for _ in range(width)]
    for slot, depth in enumerate(held):
        real.add(keys[:depth], slot)
    assert depths([real], keys, {*range(width)}, width + 1) == [*held, 0]


def test_a_full_shard_forgets_its_oldest_blocks(store: Choice):
    real, keys = kind_of(store).make(1, 800), random_keys(random.Random(1), 4000)
    for start in range(0, 4000, 8):
        real.add(keys[start : start + 8], start % 3)
        assert len(real) <= 808
    assert real.forgotten == 4000 - len(real) >= 3100
    known = [sum(depths([real], keys[at : at + 1], {0, 1, 2}, 3)) for at in range(4000)]
    assert known == [0] * (4000 - len(real)) + [1] * len(real)


def test_a_block_that_comes_back_counts_as_new(store: Choice):
    real, keys = kind_of(store).make(1, 80), random_keys(random.Random(1), 200)
    real.add(keys[:70], 0)
    for _ in range(300):
        real.remove(keys[:1], 0)
        real.add(keys[:1], 0)
    real.add(keys[70:130], 0)
    assert depths([real], keys[:1], {0}, 1) == [1]
    assert depths([real], keys[1:2], {0}, 1) == [0]


def test_the_compiled_store_is_taken_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native is not installed, or was not compiled", exc_type=ImportError)
    assert KvIndex().status() == {"store": "native", "blocks": 0, "forgotten": 0}
    assert KvIndex(store="python").status()["store"] == "python"
    monkeypatch.setitem(sys.modules, "dynamo_kv_native", None)
    assert KvIndex().status()["store"] == "python"


def test_without_the_compiled_store_everything_is_as_before_and_asking_for_it_is_the_operators_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dynamo_kv_native", None)
    assert Index().kind.name == "python"
    stack = '[router]\nscorers = [{ use = "kv-overlap" }]\nfacts = [{ use = "kv-index", store = "%s" }]\n'
    for choice in ("auto", "python"):
        config, plugins = load_with_plugins(text=stack % choice, environ={})
        assert build_stack(config.router, plugins)
    with pytest.raises(ConfigError, match=r"router\.facts\[0\]\.store: .*pip install 'dynamo-kv-router\[native\]'"):
        load_with_plugins(text=stack % "native", environ={})
