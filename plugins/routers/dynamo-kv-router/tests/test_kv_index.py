"""The index against a plain one: sets of keys, walked block by block."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dynamo_core.engines.contract import BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv import LEVELS, Chains, Hasher
from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.contract import Worker
from dynamo_kv_router.index import Index
from dynamo_kv_router.store import Choice

HASHER = Hasher(b"secret", 4)


def prompt(rng: random.Random, blocks: int) -> Keys:
    return HASHER.keys([rng.randrange(1000) for _ in range(4 * blocks)])


class PlainIndex:
    def __init__(self) -> None:
        self.held: dict[Worker, list[set[int]]] = {}

    def depths(self, keys: Keys, level: int, workers: list[Worker]) -> list[int]:
        def depth(worker: Worker) -> int:
            held = set().union(*self.held.get(worker, [set()])[: level + 1])
            return next((i for i, key in enumerate(keys.tolist()) if key not in held), len(keys))

        return [depth(worker) for worker in workers]


@pytest.mark.parametrize("seed", range(25))
def test_every_history_of_workers_and_blocks_gives_the_depths_of_the_plain_index(seed: int, store: Choice):
    rng = random.Random(seed)
    index, plain = Index(shards=rng.choice([1, 4, 64]), store=store), PlainIndex()
    trunk = [rng.randrange(1000) for _ in range(4 * 60)]
    prompts = [HASHER.keys(trunk[: 4 * cut] + [rng.randrange(1000) for _ in range(4 * rng.randrange(40))]) for cut in (0, 1, 5, 30, 60) for _ in range(4)]
    number = 0
    for _ in range(400):
        action, workers = rng.random(), [*plain.held]
        if action < 0.1 or not workers:
            number += 1
            worker = Worker(number, rng.randrange(2))
            index.join(worker)
            plain.held[worker] = [set() for _ in LEVELS]
        elif action < 0.15:
            worker = rng.choice(workers)
            index.drop_worker(worker)
            del plain.held[worker]
        elif action < 0.2:
            worker = rng.choice(workers)
            index.clear(worker)
            plain.held[worker] = [set() for _ in LEVELS]
        else:
            worker, keys = rng.choice(workers), rng.choice(prompts)
            cut, level = rng.randrange(len(keys) + 1), rng.choice([0, 0, 1])
            held = plain.held[worker]
            if action < 0.7:
                # To stay closed: what is there at another level stays there, and the host comes after the device.
                on_device = plain.depths(keys, 0, [worker])[0]
                reached = plain.depths(keys, 1, [worker])[0]
                start = reached if level else on_device
                if level == 0:
                    index.remove(worker, keys[on_device:cut], 1)
                    held[1] -= {*keys[on_device:cut].tolist()}
                index.add(worker, keys[start:cut], level)
                held[level] |= {*keys[start:cut].tolist()}
            else:
                gone = {*keys[cut:].tolist()}
                for other in prompts:  # With a block goes everything that follows it.
                    first = next((i for i, key in enumerate(other.tolist()) if key in gone), len(other))
                    gone |= {*other[first:].tolist()}
                for each in (0, 1):
                    index.remove(worker, np.array([*held[each] & gone], np.uint64), each)
                    held[each] -= gone
        asked = rng.choice(prompts)
        everyone = [*plain.held, Worker(0, 9)]
        for level in (0, 1):
            assert index.depths(asked, tuple(everyone), level).tolist() == plain.depths(asked, level, everyone)
    index.tidy(200)
    assert len(index) == len({key for held in plain.held.values() for key in held[0]}) + len({key for held in plain.held.values() for key in held[1]})


@pytest.mark.parametrize("seed", range(8))
def test_engines_that_evict_anything_at_any_time_are_matched_to_the_block(seed: int, store: Choice):
    """From engine events through the normaliser to the answer, with 70 workers that share and diverge."""
    rng = random.Random(seed)
    index, workers = Index(shards=16, store=store), tuple(Worker(i) for i in range(70))
    tokens = [rng.randrange(1000) for _ in range(4 * 80)]
    chains = {worker: Chains(HASHER) for worker in workers}
    held: dict[Worker, set[int]] = {worker: set() for worker in workers}
    for worker in workers:
        index.join(worker)
    keys = HASHER.keys(tokens)
    for _ in range(60):
        for worker in workers:
            depth = next((i for i in range(80) if i not in held[worker]), 80)
            events: list[KvEvent] = []
            if depth < 80 and rng.random() < 0.6:
                end = rng.randrange(depth, 80)
                missing = [i for i in range(depth, end) if i not in held[worker]]
                events += [BlocksStored([i], i - 1 if i else None, tokens[4 * i : 4 * i + 4]) for i in missing]
                held[worker] |= {*missing}
            gone = rng.sample(sorted(held[worker]), min(len(held[worker]), rng.randrange(4)))
            held[worker] -= {*gone}
            events.append(BlocksRemoved(gone))
            for change in chains[worker].apply(events):
                index.apply(worker, change)
        expected = [next((i for i in range(80) if i not in held[worker]), 80) for worker in workers]
        assert index.depths(keys, workers).tolist() == expected


@pytest.mark.parametrize("workers", [1, 3, 64, 300])
@pytest.mark.parametrize("blocks", [1, 2, 33, 512])
def test_depths_are_exact_also_when_every_worker_has_another(workers: int, blocks: int, store: Choice):
    rng = random.Random(workers * blocks)
    index, keys = Index(store=store), prompt(rng, blocks)
    fleet = tuple(Worker(i) for i in range(workers))
    depths = [rng.randrange(blocks + 1) for _ in fleet]
    for worker, depth in zip(fleet, depths, strict=True):
        index.join(worker)
        index.add(worker, keys[:depth])
    assert index.depths(keys, fleet).tolist() == depths
    assert index.depths(keys, fleet[::-1]).tolist() == depths[::-1]


def test_a_worker_that_leaves_takes_its_blocks_along_at_once_and_its_place_is_clean_when_it_is_given_away(store: Choice):
    rng = random.Random(1)
    index, keys = Index(shards=64, store=store), prompt(rng, 100)
    for i in range(500):
        worker = Worker(i)
        index.join(worker)
        assert index.depths(keys, (worker,)).tolist() == [0]
        index.add(worker, keys)
        assert index.depths(keys, (worker,)).tolist() == [100]
        index.drop_worker(worker)
        assert index.depths(keys, (worker,)).tolist() == [0]
    assert index.width < 200
    index.tidy(200)
    assert len(index) == 0


def test_changes_of_strangers_are_ignored(store: Choice):
    index, keys = Index(store=store), prompt(random.Random(1), 4)
    index.add(Worker(1), keys)
    index.remove(Worker(1), keys)
    index.clear(Worker(1))
    index.drop_worker(Worker(1))
    assert len(index) == 0
    assert index.depths(keys[:0], (Worker(1),)).tolist() == [0]


def test_past_its_limit_it_forgets_the_oldest_and_never_says_more_than_there_is(store: Choice):
    rng = random.Random(2)
    index, worker = Index(limit=4096, shards=16, store=store), Worker(1)
    index.join(worker)
    prompts = [prompt(rng, 50) for _ in range(1000)]
    for keys in prompts:
        index.add(worker, keys)
        assert len(index) <= 4096 * 1.2
    assert index.forgotten > 40000
    assert all(index.depths(keys, (worker,))[0] <= 50 for keys in prompts)
    assert index.depths(prompts[-1], (worker,)).tolist() == [50]


def test_a_store_that_is_repeated_and_a_removal_of_nothing_change_nothing(store: Choice):
    index, keys, fleet = Index(store=store), prompt(random.Random(1), 10), (Worker(1), Worker(2))
    for worker in fleet:
        index.join(worker)
        index.add(worker, keys)
        index.add(worker, keys[:5])
    index.remove(fleet[0], keys[5:])
    index.remove(fleet[0], keys[5:])
    assert index.depths(keys, fleet).tolist() == [5, 10]


def test_the_number_of_shards_is_a_power_of_two(store: Choice):
    with pytest.raises(ValueError, match="power of two"):
        Index(shards=3, store=store)


def test_an_engine_that_clears_its_cache_again_and_again_takes_one_place(store: Choice):
    index, keys, worker = Index(store=store), prompt(random.Random(1), 10), Worker(1)
    index.join(worker)
    index.add(worker, keys)
    for _ in range(1000):
        index.clear(worker)
    assert index.depths(keys, (worker,)).tolist() == [0]
    assert index.width == 2
    index.add(worker, keys[:4])
    assert index.depths(keys, (worker,)).tolist() == [4]
