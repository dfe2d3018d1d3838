"""The fast normaliser against a plain one, and every oddity of engines by name."""

from __future__ import annotations

import random
import sys

import attrs
import pytest

from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv import LEVELS, Chains, Change, Hasher, Op, blocks
from dynamo_core.kv.hashing import digest_of

pytestmark = pytest.mark.usefixtures("either_blocks")
SIZE = 4
HASHER = Hasher(b"secret", SIZE)


class Picture:
    """What a follower of the changes believes."""

    def __init__(self) -> None:
        self.levels: list[set[int]] = [set() for _ in LEVELS]

    def follow(self, changes: list[Change]) -> Picture:
        for op, level, keys in changes:
            if op is Op.CLEAR:
                self.levels = [set() for _ in LEVELS]
            elif op is Op.ADD:
                assert not self.levels[level] & {*keys.tolist()}, "added twice"
                self.levels[level] |= {*keys.tolist()}
            else:
                assert self.levels[level] >= {*keys.tolist()}, "removed what was not there"
                self.levels[level] -= {*keys.tolist()}
        return self


@attrs.define
class Block:
    hash: int
    parent: Block | None
    key: int
    tokens: list[int]
    copies: list[int]

    def level(self) -> int:
        own = next((i for i, n in enumerate(self.copies) if n), len(LEVELS))
        return max(own, self.parent.level()) if self.parent and own < len(LEVELS) else own


class PlainEngine:
    """A cache without any cleverness, which reports what it does."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.blocks: dict[int, Block] = {}

    def tree(self, count: int) -> None:
        for i in range(1, count + 1):
            parent = self.rng.choice([None, *self.blocks.values()]) if self.blocks else None
            tokens = [self.rng.randrange(50) for _ in range(SIZE)]
            self.blocks[i] = Block(i, parent, int(HASHER.keys(tokens, parent.key if parent else 0)[0]), tokens, [0] * len(LEVELS))

    def chain(self) -> list[Block]:
        block: Block | None = self.rng.choice([*self.blocks.values()])
        chain: list[Block] = []
        while block:
            chain.insert(0, block)
            block = block.parent
        return chain

    def step(self) -> KvEvent:
        rng, here = self.rng, lambda block: block is None or any(block.copies)
        level = rng.choice([0, 0, 0, 1, 2])
        action = rng.random()
        if action < 0.55:
            chain = self.chain()
            first = rng.randrange(len(chain))
            while first and not here(chain[first].parent):
                first -= 1
            for block in chain[first:]:
                block.copies[level] += 1
            parent = chain[first].parent
            return BlocksStored([b.hash for b in chain[first:]], parent.hash if parent else None, [t for b in chain[first:] for t in b.tokens], LEVELS[level])
        if action < 0.97:
            held = [b for b in self.blocks.values() if b.copies[level]]
            gone = rng.sample(held, min(len(held), rng.randrange(1, 6)))
            for block in gone:
                block.copies[level] -= 1
            return BlocksRemoved([b.hash for b in gone], LEVELS[level])
        for block in self.blocks.values():
            block.copies = [0] * len(LEVELS)
        return BlocksCleared()

    def levels(self) -> list[set[int]]:
        return [{b.key for b in self.blocks.values() if b.level() == level} for level in range(len(LEVELS))]


@pytest.mark.parametrize("seed", range(30))
def test_every_history_leaves_the_picture_that_the_engine_has(seed: int):
    rng = random.Random(seed)
    engine, chains, picture = PlainEngine(rng), Chains(HASHER), Picture()
    engine.tree(rng.choice([5, 20, 60]))
    for _ in range(400):
        events = [engine.step() for _ in range(rng.randrange(1, 4))]
        picture.follow(chains.apply(events))
        assert picture.levels == engine.levels()
    assert Picture().follow(chains.picture()).levels == picture.levels
    assert not chains.problem()
    assert not chains.unlinked


def stored(hashes: list[int | bytes], parent: int | bytes | None = None, start: int = 0, **more: object) -> BlocksStored:
    return BlocksStored(hashes, parent, list(range(start, start + SIZE * len(hashes))), **more)  # pyright: ignore[reportArgumentType]


def size(changes: list[Change]) -> list[tuple[str, int, int]]:
    return [(op.name, level, len(keys)) for op, level, keys in changes]


def test_a_block_under_an_evicted_one_is_out_of_reach_until_that_is_stored_again():
    chains = Chains(HASHER)
    chains.apply([stored([1, 2, 3])])
    assert size(chains.apply([BlocksRemoved([2])])) == [("REMOVE", 0, 2)]
    assert size(chains.apply([stored([2], 1, SIZE)])) == [("ADD", 0, 2)]
    assert len(chains) == 3


def test_a_block_stored_twice_is_there_until_it_is_removed_twice():
    chains = Chains(HASHER)
    assert size(chains.apply([stored([1]), stored([1])])) == [("ADD", 0, 1)]
    assert size(chains.apply([BlocksRemoved([1])])) == []
    assert size(chains.apply([BlocksRemoved([1])])) == [("REMOVE", 0, 1)]
    assert size(chains.apply([BlocksRemoved([1])])) == []


def test_an_event_may_name_a_block_twice():
    chains = Chains(HASHER)
    assert size(chains.apply([BlocksStored([1, 1], None, [1] * 8)])) == [("ADD", 0, 1)]


def test_bytes_and_signed_numbers_are_hashes_like_any_other():
    chains = Chains(HASHER)
    chains.apply([stored([b"a", b"b"]), stored([-5, 7], None, 50)])
    assert size(chains.apply([stored([9], 2**64 - 5, 90)])) == [("ADD", 0, 1)]
    assert size(chains.apply([BlocksRemoved([2**64 - 5]), BlocksRemoved([b"b"])])) == [("REMOVE", 0, 4)]


def test_a_partial_last_block_is_left_out():
    chains = Chains(HASHER)
    assert size(chains.apply([BlocksStored([1, 2], None, list(range(SIZE + 2)))])) == [("ADD", 0, 1)]
    assert size(chains.apply([BlocksRemoved([2, 1])])) == [("REMOVE", 0, 1)]


def test_an_engine_that_lies_about_its_block_size_is_caught():
    chains = Chains(HASHER)
    assert chains.apply([BlocksStored([1, 2], None, list(range(16)))]) == []
    assert "16 tokens in 2 blocks" in chains.problem()


def test_blocks_below_one_that_was_never_reported_are_left_out_and_counted():
    chains = Chains(HASHER)
    assert chains.apply([stored([5, 6], 4), stored([7], 7)]) == []
    assert chains.unlinked == 3


@pytest.mark.parametrize("event", [
    BlocksStored([1], None, [-1] * SIZE), BlocksStored([1], None, ["x"] * SIZE), BlocksStored([[1]], None, [1] * SIZE),  # type: ignore[list-item]
    BlocksRemoved([[1]]), BlocksStored([1], [2], [1] * SIZE), BlocksStored([1], None, [2**70] * SIZE),  # type: ignore[list-item,arg-type]
])
def test_a_malformed_event_is_left_out_and_counted_and_the_next_counts(event: KvEvent):
    chains = Chains(HASHER)
    chains.apply([stored([11, 12])])
    assert size(chains.apply([event, stored([13], 12, 30)])) == [("ADD", 0, 1)]
    assert chains.malformed == 1
    assert len(chains) == 3


def test_moving_to_the_host_and_back_needs_no_tokens():
    chains = Chains(HASHER)
    chains.apply([stored([1, 2])])
    assert size(chains.apply([BlocksStored([1, 2], None, [], "host")])) == []
    assert size(chains.apply([BlocksRemoved([1])])) == [("REMOVE", 0, 1), ("ADD", 1, 1), ("REMOVE", 0, 1), ("ADD", 1, 1)]
    assert size(chains.apply([BlocksStored([1], None, [], "device")])) == [("REMOVE", 1, 1), ("ADD", 0, 1), ("REMOVE", 1, 1), ("ADD", 0, 1)]


def test_unknown_tiers_count_as_external():
    chains = Chains(HASHER)
    assert size(chains.apply([stored([1], tier="tape")])) == [("ADD", 3, 1)]


def test_past_the_limit_blocks_are_left_out_until_there_is_room():
    chains = Chains(HASHER, limit=3)
    assert size(chains.apply([stored([1, 2]), stored([3, 4], None, 50)])) == [("ADD", 0, 2)]
    assert "more than 3 blocks" in chains.problem()
    chains.apply([BlocksRemoved([2, 1])])
    assert size(chains.apply([stored([3, 4], None, 50)])) == [("ADD", 0, 2)]
    assert not chains.problem()


def test_a_parent_of_many_short_lived_children_and_many_ghosts_do_not_make_it_grow():
    chains = Chains(HASHER)
    chains.apply([stored([0])])
    for i in range(1, 6000):
        chains.apply([BlocksStored([i], 0, [i] * SIZE), BlocksStored([-i], i, [i] * SIZE)])
        chains.apply([BlocksRemoved([i]), BlocksRemoved([-i])])
    assert len(chains) == 1
    if isinstance(kept := chains._blocks, blocks.Blocks):  # pyright: ignore[reportPrivateUsage]
        assert len(kept._next) < 2000  # pyright: ignore[reportPrivateUsage]
        assert sum(map(len, kept._more.values())) < 2000  # pyright: ignore[reportPrivateUsage]
    else:
        assert sys.getsizeof(kept) < 60_000


def test_media_of_a_block_are_part_of_its_name():
    plain, cat = Chains(HASHER), Chains(HASHER)
    first = plain.apply([stored([1, 2])])[0].keys.tolist()
    second = cat.apply([stored([1, 2], media=[[], ["cat"]])])[0].keys.tolist()
    assert first[0] == second[0]
    assert first[1] != second[1] == HASHER.keys(list(range(8)), 0, [(1, digest_of("cat"))]).tolist()[1]


class Colliding(Hasher):
    """Two blocks in three have the key of another."""

    def keys(self, *arguments: object, **more: object):  # type: ignore[override]
        keys = super().keys(*arguments, **more)  # type: ignore[arg-type]
        return keys & keys.dtype.type(0xFFFF_0000_0000_0003)


def test_keys_that_collide_misplace_blocks_and_break_nothing():
    rng = random.Random(3)
    engine, chains = PlainEngine(rng), Chains(Colliding(b"s", SIZE))
    engine.tree(40)
    for _ in range(200):
        chains.apply([engine.step()])
    chains.apply([BlocksRemoved([h], tier) for h in range(1, 41) for tier in LEVELS for _ in range(120)])
    assert len(chains) == 0
    assert chains.picture() == []
