from __future__ import annotations

import random

import numpy as np
import pytest

from dynamo_core.kv import Hasher
from dynamo_core.routing.contract import Worker
from dynamo_kv_router.index import Index
from dynamo_kv_router.recent import Recent
from dynamo_kv_router.store import Choice

HASHER = Hasher(b"s", 4)
A, B = Worker(1), Worker(2)


def book(limit: int = 10_000, ttl: float = 10.0, room: int = 1000, store: Choice = "auto") -> tuple[Index, Recent]:
    index = Index(shards=4, store=store)
    recent = Recent(index, limit)
    for worker in (A, B):
        index.join(worker)
        recent.join(worker, ttl, room)
    return index, recent


def depth(index: Index, keys: object) -> list[int]:
    return index.depths(keys, (A, B), sent=True).tolist()  # type: ignore[arg-type]


def chain(seed: int, blocks: int = 10):
    rng = random.Random(seed)
    return HASHER.keys([rng.randrange(1000) for _ in range(4 * blocks)])


def test_what_was_sent_counts_until_its_time_is_up():
    index, recent = book()
    recent.record(A, chain(1), 0.0)
    recent.expire(9.9)
    assert depth(index, chain(1)) == [10, 0]
    assert index.depths(chain(1), (A, B)).tolist() == [0, 0], "it is not on the device for certain"
    recent.expire(10.0)
    assert depth(index, chain(1)) == [0, 0]
    assert len(recent) == len(index) == 0


def test_a_prefix_that_is_sent_again_stays_and_the_rest_goes():
    index, recent = book()
    recent.record(A, chain(1), 0.0)
    recent.record(A, chain(1)[:4], 5.0)
    recent.expire(11.0)
    assert depth(index, chain(1)) == [4, 0]
    recent.expire(15.0)
    assert len(recent) == 0


def test_a_tail_that_is_sent_again_stays_too():
    index, recent = book()
    recent.record(A, chain(1), 0.0)
    recent.record(A, chain(1)[6:], 5.0)
    index.add(A, chain(1)[:6])
    recent.expire(11.0)
    assert depth(index, chain(1)) == [10, 0]


def test_a_worker_holds_no_more_than_it_has_room_for_and_forgets_the_oldest():
    index, recent = book(room=25)
    for i in range(4):
        recent.record(A, chain(i), float(i))
    assert [depth(index, chain(i))[0] for i in range(4)] == [0, 0, 10, 10]
    recent.record(A, chain(9, 100), 9.0)
    assert depth(index, chain(9, 100)) == [25, 0]


def test_past_the_limit_the_worker_with_most_gives_way():
    index, recent = book(limit=50)
    recent.record(B, chain(100), 0.0)
    for i in range(20):
        recent.record(A, chain(i), float(i))
    assert len(recent) <= 50
    assert depth(index, chain(100)) == [0, 10]
    assert depth(index, chain(19)) == [10, 0]


def test_a_worker_that_leaves_or_is_followed_differently_takes_effect():
    index, recent = book(ttl=100.0)
    recent.record(A, chain(1), 0.0)
    recent.record(B, chain(1), 0.0)
    recent.join(A, 1.0, 1000)
    recent.expire(2.0)
    assert depth(index, chain(1)) == [0, 10]
    recent.drop_worker(B)
    index.drop_worker(B)
    assert len(recent) == 0
    recent.record(B, chain(1), 3.0)
    assert len(recent) == 0


def test_what_is_assumed_survives_that_the_index_clears_the_worker():
    index, recent = book()
    recent.record(A, chain(1), 0.0)
    index.clear(A)
    assert depth(index, chain(1)) == [0, 0]
    recent.restore(A)
    assert depth(index, chain(1)) == [10, 0]


@pytest.mark.parametrize("seed", range(10))
def test_what_it_says_to_hold_is_what_the_index_has(seed: int, store: Choice):
    rng = random.Random(seed)
    index, recent = book(limit=300, ttl=8.0, room=200, store=store)
    chains = [chain(seed, 30) for seed in range(30)]
    for i in range(500):
        recent.record(rng.choice([A, B]), rng.choice(chains)[: rng.randrange(31)], i * 0.1)
        recent.expire(i * 0.1)
        assert len(recent) <= 300
        if i % 20 == 0:
            assert sum(sum(depth(index, keys[at : at + 1])) for keys in chains for at in range(30)) == len(recent)


def test_a_prompt_that_is_sent_again_and_again_takes_no_more_memory_than_once():
    index, recent = book(ttl=100.0, room=10_000)
    system, users = chain(1, 3000), [chain(seed, 20) for seed in range(2, 22)]
    for i in range(500):
        recent.record(A, np.concatenate([system, users[i % 20]]), i * 0.01)
    assert len(recent) == 3400
    assert sum(len(keys) for _, keys in recent.chains(A)) <= 2 * 3400 + 4096 + 3020
    assert [at for at, _ in recent.chains(A)] == sorted(at for at, _ in recent.chains(A))
    assert depth(index, np.concatenate([system, users[3]])) == [3020, 0]
    while recent.expire(104.9):
        pass
    assert [depth(index, np.concatenate([system, users[i]]))[0] for i in (9, 19)] == [3000, 3020]
    while recent.expire(105.0):
        pass
    assert len(recent) == len(index) == 0


def test_what_is_too_old_can_be_forgotten_at_leisure_until_nothing_is_left():
    index, recent = book(ttl=1.0)
    for i in range(100):
        recent.record(A, chain(i), 0.0)
    calls = 0
    while recent.expire(2.0):
        calls += 1
    assert calls > 5
    assert len(recent) == len(index) == 0
