"""The block pool against a plain model: never too many blocks, counts that add up, and events that tell the exact content."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynamo_core.engines import BlocksRemoved, BlocksStored
from dynamo_sim.blocks import BlockPool, chain, root_hash

SIZE = 2
TOTAL = 12
ROOT = root_hash(None, None)


def hashes_of(tokens: list[int]) -> list[int]:
    return chain(ROOT, array("I", tokens), SIZE)


class Pool(RuleBasedStateMachine):
    """Sequences over a two-letter alphabet, so that prefixes meet often, in a pool that is soon full."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL)
        self.users: list[tuple[list[int], int]] = []
        """Hashes in use and private blocks of each sequence that runs."""
        self.content: dict[int, tuple[int | None, tuple[int, ...]]] = {}
        """What the events say is cached: hash to parent and tokens."""

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11))
    def run_a_sequence(self, tokens: list[int]) -> None:
        hashes = hashes_of(tokens)
        held = self.pool.hold(hashes, (len(tokens) - 1) // SIZE)
        before = self.pool.used
        need = -(-len(tokens) // SIZE) - held
        if not self.pool.take(need):
            assert need > TOTAL - before
            self.pool.release(hashes[:held], 0)
            return
        full = hashes[held:]
        if full:
            self.pool.commit(full, hashes[held - 1] if held else None, tokens[held * SIZE : len(hashes) * SIZE], None, None)
        self.users.append((hashes, need - len(full)))

    @precondition(lambda self: self.users)
    @rule(which=st.integers(0, 100))
    def end_a_sequence(self, which: int) -> None:
        self.pool.release(*self.users.pop(which % len(self.users)))

    @rule()
    def forget_idle(self) -> None:
        self.pool.forget_idle()

    @invariant()
    def the_pool_is_what_its_users_and_events_say(self) -> None:
        for event in self.pool.drain_events():
            if isinstance(event, BlocksStored):
                assert len(event.token_ids) == SIZE * len(event.hashes)
                parent = event.parent
                for i, block in enumerate(event.hashes):
                    assert block not in self.content, "stored twice"
                    assert parent is None or parent in self.content, "stored below nothing"
                    self.content[block] = (parent, tuple(event.token_ids[i * SIZE : (i + 1) * SIZE]))
                    parent = block
            else:
                assert isinstance(event, BlocksRemoved)
                for block in event.hashes:
                    del self.content[block]
                    assert all(parent != block for parent, _ in self.content.values() if parent not in event.hashes), "removed before its descendants"
        in_use = [block for hashes, _ in self.users for block in hashes]
        assert all(self.pool.users(block) == in_use.count(block) for block in self.content)
        assert self.pool.private == sum(private for _, private in self.users)
        assert self.pool.used == len(set(in_use)) + self.pool.private
        assert self.pool.cached == len(self.content)
        assert self.pool.cached + self.pool.private <= TOTAL
        assert set(in_use) <= set(self.content), "in use and evicted"


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_prefix_goes_first_and_its_leaf_before_its_root() -> None:
    pool = BlockPool(4)
    old, new = hashes_of([1, 1, 1, 1]), hashes_of([2, 2, 2, 2])
    for hashes, tokens in ((old, [1, 1, 1, 1]), (new, [2, 2, 2, 2])):
        assert pool.take(2)
        pool.commit(hashes, None, tokens, None, None)
        pool.release(hashes, 0)
    pool.drain_events()
    assert pool.take(1)
    assert pool.take(1)
    assert pool.drain_events() == [BlocksRemoved([old[1]]), BlocksRemoved([old[0]])]
    assert pool.hold(new, 2) == 2


def test_what_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(2)
    assert pool.take(1)
    assert not pool.take(2)
    assert pool.used == 1
    assert pool.take(1)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 7), st.integers(0, 40))
def test_a_chain_can_be_continued_where_it_stopped(tokens: list[int], size: int, cut: int) -> None:
    cut = min(cut, len(tokens)) // size * size
    head = chain(ROOT, array("I", tokens[:cut]), size)
    tail = chain(head[-1] if head else ROOT, array("I", tokens[cut:]), size)
    assert head + tail == chain(ROOT, array("I", tokens), size)
    assert len(set(head + tail)) == len(tokens) // size


@pytest.mark.parametrize("other", [("adapter", None), (None, "salt"), ("salt", None)])
def test_adapters_and_salts_have_roots_of_their_own(other: tuple[str | None, str | None]) -> None:
    assert len({ROOT, root_hash(None, "adapter"), root_hash(*other)}) == 3
