"""A paged prefix cache of which only block keys are known: half the memory and a third of the time of one that keeps an ordered dictionary.

Blocks that a request gives back together form a *bundle*. Bundles are evicted oldest first, each from its tail, so that a block never goes before
its descendants. A block that was used again meanwhile belongs to a newer bundle, or to nobody, and is passed over in the old one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat

import attrs
import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]


@attrs.define(eq=False)
class _Bundle:
    number: int
    names: Keys | None
    """Leaf last; `None`: generated blocks, which nobody will ask for."""
    size: int
    """How many of them are left to pass."""
    keys: list[int] | None = None
    """`names` as Python integers, once it is the oldest."""


class BlockCache:
    """Accounts for every block. A call either succeeds or changes nothing."""

    def __init__(self, total: int, *, watched: bool) -> None:
        """:param watched: collect what is stored and removed, for `drain`."""
        self.total = total
        self.private = 0
        """Blocks of one request alone: partly filled, or generated."""
        self._watched = watched
        self._state: dict[int, int] = {}
        """Key to number of users; or, when nobody uses it, to minus the number of its bundle."""
        self._idle = 0
        """Blocks that can be evicted, nameless ones included."""
        self._nameless = 0
        self._bundles: deque[_Bundle] = deque()
        self._bundled = 0
        self._number = 0
        self._changes: list[tuple[bool, Keys]] = []

    @property
    def used(self) -> int:
        """Blocks that somebody needs now."""
        return len(self._state) + self._nameless - self._idle + self.private

    def depth(self, keys: Sequence[int], limit: int) -> int:
        """Length of the longest prefix that is cached, at most `limit`."""
        state, low, high = self._state, 0, min(limit, len(keys))
        if not high or keys[0] not in state:
            return 0
        if keys[high - 1] in state:
            return high
        while high - low > 1:
            middle = (low + high) >> 1
            if keys[middle] in state:
                low = middle
            else:
                high = middle
        return high

    def take(self, keys: Sequence[int], names: Keys, start: int, end: int, private: int) -> bool:
        """Use blocks `start` to `end` of a prompt, cached or not, and `private` others. False: there are not that many."""
        state = self._state
        first = start
        revived: list[int] = []
        while first < end and (users := state.get(keys[first], 0)):
            if users > 0:
                state[keys[first]] = users + 1
            else:
                state[keys[first]] = 1
                revived.append(-users)
            first += 1
        self._idle -= len(revived)
        if not self._evict(end - first + private):
            self._give_up(keys, start, first, revived)
            return False
        if first < end:
            state.update(zip(keys[first:end], repeat(1)))
            if self._watched:
                self._changes.append((True, names[first:end]))
        self.private += private
        return True

    def _give_up(self, keys: Sequence[int], start: int, first: int, revived: list[int]) -> None:
        state = self._state
        self._idle += len(revived)
        for i in range(first - 1, start - 1, -1):
            users = state[keys[i]] - 1
            state[keys[i]] = users or -revived.pop()

    def release(self, keys: Sequence[int], names: Keys, held: int, private: int, generated: int) -> None:
        """Stop using the first `held` blocks of a prompt and `private` others, of which `generated` are full and stay until their space is needed."""
        self.private -= private
        if generated:
            self._bundles.append(_Bundle(0, None, generated))
            self._nameless += generated
            self._idle += generated
        if not held:
            return
        self._number += 1
        number, state, idle = -self._number, self._state, 0
        for key in keys[held - 1 :: -1] if held < len(keys) else reversed(keys):
            users = state[key] - 1
            if users:
                state[key] = users
            else:
                state[key] = number
                idle += 1
        if idle:
            # Users of a block use its ancestors, too: the idle ones are the last of the chain.
            self._idle += idle
            self._bundled += idle
            self._bundles.append(_Bundle(self._number, names[held - idle : held], idle))
            if self._bundled > 4 * self.total:
                self._sweep()

    def drain(self) -> list[tuple[bool, Keys]]:
        """What was stored (True) and removed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _evict(self, wanted: int) -> bool:
        """Make room for `wanted` blocks."""
        missing = wanted - (self.total - self.private - len(self._state) - self._nameless)
        if missing <= 0:
            return True
        if missing > self._idle:
            return False
        self._idle -= missing
        state, bundles = self._state, self._bundles
        gone: list[int] = []
        while missing:
            bundle = bundles[0]
            if bundle.names is None:
                count = min(missing, bundle.size)
                bundle.size -= count
                self._nameless -= count
                missing -= count
            else:
                keys = bundle.keys
                if keys is None:
                    keys = bundle.keys = bundle.names.tolist()
                number = -bundle.number
                self._bundled -= len(keys)
                while keys and missing:
                    if state.get(key := keys.pop()) == number:
                        del state[key]
                        gone.append(key)
                        missing -= 1
                bundle.size = len(keys)
                self._bundled += len(keys)
            if not bundle.size:
                bundles.popleft()
        if gone and self._watched:
            self._changes.append((False, np.array(gone, np.uint64)))
        return True

    def _sweep(self) -> None:
        """Forget what bundles say of blocks that were used again."""
        state = self._state
        kept: deque[_Bundle] = deque()
        self._bundled = 0
        for bundle in self._bundles:
            if bundle.names is not None:
                keys = [key for key in (bundle.keys if bundle.keys is not None else bundle.names.tolist()) if state.get(key) == -bundle.number]
                if not keys:
                    continue
                bundle = _Bundle(bundle.number, np.array(keys, np.uint64), len(keys))
                self._bundled += len(keys)
            kept.append(bundle)
        self._bundles = kept
