"""A coarse index says what a fine one says, rounded down, whatever is stored and removed."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.engines.contract import BlocksRemoved, BlocksStored
from dynamo_core.kv.hashing import Hasher, depth_of, depths_of
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.types import Instance
from dynamo_kv_router.grain import Grain
from dynamo_kv_router.provider import KvIndex
from dynamo_kv_router.store import Choice

FLEET = tuple(Worker(i) for i in range(3))


def provider(every: int, **options) -> KvIndex:
    found = KvIndex(every=every, **options)
    for worker in FLEET:
        instance = Instance(id=worker.instance, namespace="n", component="c", endpoint="e", address="a")
        found.joined(worker, instance, ModelCard(name="m", block_size=16, total_blocks=1000, kv_events=options.get("mode") != "approximate"))
    return found


def overlaps(found: KvIndex, prompt: list[int]) -> list[int]:
    return [int(x) for x in found.columns(RoutingRequest("r", "m", prompt, len(prompt)), FLEET)[OVERLAP_TOKENS]]


def history(rng: random.Random):
    """What one engine stores and evicts: blocks of chains with shared beginnings, also inner ones."""
    texts = [[rng.randrange(9) for _ in range(16 * rng.randrange(1, 30))] for _ in range(4)]
    names: dict[tuple[int, ...], int] = {}
    held: set[tuple[int, ...]] = set()
    for _ in range(60):
        if held and rng.random() < 0.4:
            gone = rng.choice(sorted(held))
            held.discard(gone)
            yield BlocksRemoved([names[gone]], "device")
            continue
        root = rng.choice(texts)
        text = root[: 16 * rng.randrange(1, len(root) // 16 + 1)] + [rng.randrange(9) for _ in range(16 * rng.randrange(0, 4))]
        parent, fresh, tokens = None, [], []
        for end in range(16, len(text) + 1, 16):
            block = tuple(text[:end])
            if block in held and not fresh:
                parent = names[block]
            else:
                fresh.append(names.setdefault(block, len(names) + 1))
                tokens += text[end - 16 : end]
                held.add(block)
        if fresh:
            yield BlocksStored(fresh, parent, tokens, "device")
    yield from ()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("every", [32, 64, 100])
def test_overlaps_of_a_coarse_index_are_those_of_a_fine_one_rounded_down(seed: int, every: int, store: Choice) -> None:
    rng = random.Random(seed)
    fine, coarse = provider(0, store=store), provider(every, store=store)
    grain = every // 16 * 16
    asked: list[list[int]] = []
    for worker in FLEET:
        for event in history(random.Random(seed * 10 + worker.instance % 2)):
            fine.feed(worker, [event])
            coarse.feed(worker, [event])
            if isinstance(event, BlocksStored) and event.parent is None:
                asked.append([*event.token_ids, *(rng.randrange(9) for _ in range(rng.randrange(40)))])
    for prompt in asked[:40]:
        assert overlaps(coarse, prompt) == [tokens // grain * grain for tokens in overlaps(fine, prompt)]


def test_what_was_sent_is_kept_at_the_same_grain(store: Choice) -> None:
    found, prompt = provider(64, mode="approximate", store=store), list(range(500))
    found.booked(RoutingRequest("r", "m", prompt, 500), FLEET[1], 0)
    assert overlaps(found, prompt[:200]) == [0, 192, 0]
    assert overlaps(found, prompt[:63]) == [0, 0, 0]


def test_keys_know_their_depth() -> None:
    keys = Hasher(b"s", 4).keys(list(range(400)))
    assert depths_of(keys).tolist() == [depth_of(key) for key in keys.tolist()] == list(range(1, 101))
    assert np.array_equal(Grain(16, 4).of_prompt(keys), keys[3::4])
    assert Grain(0, 16).tokens == Grain(15, 16).tokens == 16
