"""The paged prefix cache: a fixed number of KV blocks, shared by content, evicted least recently used first.

A full block is known by a hash of its tokens and of everything before them, so that equal prefixes share blocks. A block
in use is *active*; one that nobody uses keeps its content and is *idle* until its space is needed. The last, partly
filled block of a sequence belongs to it alone and is *private*.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from dynamo_core.engines import BlocksRemoved, BlocksStored, KvEvent


def root_hash(adapter: str | None, cache_salt: str | None, media: Sequence[str] = ()) -> int:
    """Where a chain of blocks starts: prompts of different adapters, salts or images share nothing."""
    return _digest(repr((adapter, cache_salt, *media)).encode())


def chain(parent: int, tokens: array[int], block_size: int) -> list[int]:
    """Hashes of the full blocks of `tokens` that follow the block `parent`. Tokens are 32-bit (`array("I")`)."""
    data = memoryview(tokens).cast("B")
    width = block_size * tokens.itemsize
    hashes: list[int] = []
    for start in range(0, len(data) - width + 1, width):
        parent = int.from_bytes(blake2b(data[start : start + width], digest_size=8, key=parent.to_bytes(8, "little")).digest(), "little")
        hashes.append(parent)
    return hashes


def _digest(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


class BlockPool:
    """Accounts for every block; knows nothing of requests. All or nothing: a call either succeeds or changes nothing."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.private = 0
        self._active: dict[int, int] = {}
        """Hash to number of users."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Least recently used first. A block is never before its descendants: who uses a block uses its ancestors too,
        and `release` gives them back leaf first."""
        self._events: list[KvEvent] = []

    @property
    def used(self) -> int:
        """Blocks that somebody needs now."""
        return len(self._active) + self.private

    @property
    def cached(self) -> int:
        """Blocks whose content a new request could reuse."""
        return len(self._active) + len(self._idle)

    def users(self, block: int) -> int:
        return self._active.get(block, 0)

    def drain_events(self) -> list[KvEvent]:
        """What was stored and removed since the last call, in order."""
        events, self._events = self._events, []
        return events

    def hold(self, hashes: Sequence[int], limit: int) -> int:
        """Use the longest cached prefix of `hashes`, at most `limit` blocks. Returns its length."""
        active, idle = self._active, self._idle
        for i in range(min(limit, len(hashes))):
            block = hashes[i]
            if block in active:
                active[block] += 1
            elif block in idle:
                del idle[block]
                active[block] = 1
            else:
                return i
        return min(limit, len(hashes))

    def take(self, count: int) -> bool:
        """Claim `count` private blocks, evicting idle ones as needed. False: there are not that many."""
        evict = count - (self.total - self.private - len(self._active) - len(self._idle))
        if evict > len(self._idle):
            return False
        if evict > 0:
            self._events.append(BlocksRemoved([self._idle.popitem(last=False)[0] for _ in range(evict)]))
        self.private += count
        return True

    def commit(self, hashes: Sequence[int], parent: int | None, token_ids: Sequence[int], adapter: str | None, cache_salt: str | None,
               media: Sequence[str] = ()) -> None:  # fmt: skip
        """Turn private blocks that are now full and computed into shared ones.

        What is cached already is shared, and the copy given back; what is new is announced. `token_ids` are the tokens
        of all of `hashes`, `parent` the block before the first.
        """
        self.private -= len(hashes)
        known = self.hold(hashes, len(hashes))
        if known == len(hashes):
            return
        for block in hashes[known:]:
            self._active[block] = 1
        width = len(token_ids) // len(hashes)
        before = hashes[known - 1] if known else parent
        images = [list(media) for _ in hashes[known:]] if media else ()
        self._events.append(BlocksStored(hashes[known:], before, token_ids[known * width :], adapter=adapter, cache_salt=cache_salt, media=images))

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Stop using blocks. Shared ones stay cached until their space is needed; leaves go first."""
        self.private -= private
        active = self._active
        for block in reversed(hashes):
            users = active[block] - 1
            if users:
                active[block] = users
            else:
                del active[block]
                self._idle[block] = None

    def forget_idle(self) -> int:
        """Drop every block that nobody uses. Returns how many."""
        dropped = list(self._idle)
        if dropped:
            self._events.append(BlocksRemoved(dropped))
            self._idle.clear()
        return len(dropped)
