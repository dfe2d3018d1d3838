"""Which prefix blocks are in use by requests in progress, worker by worker, with shared blocks counted once.

Requests in progress form a trie for each worker. Reference counts never rise along a chain, so that the part of a chain
that only one request uses is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

from dynamo_core.routing.contract import Worker

_GROUPS = 48
"""After this many different depths the workers that are left share the depth of the shallowest: latency is bounded, and such fleets are rare."""


class ActiveChains:
    """Chains of prefix keys by worker. A key stands for a block *and* all blocks before it."""

    def __init__(self) -> None:
        self._counts: dict[Worker, dict[int, int]] = {}
        self._slots: dict[Worker, int] = {}
        self._free: list[int] = []
        self._holders: dict[int, int] = {}
        """Key to a bit set of slots."""

    def join(self, worker: Worker) -> None:
        if worker not in self._slots:
            self._slots[worker] = self._free.pop() if self._free else len(self._slots)
            self._counts[worker] = {}

    def leave(self, worker: Worker) -> None:
        if (slot := self._slots.pop(worker, None)) is not None:
            self._release(self._counts.pop(worker), ~(1 << slot))
            self._free.append(slot)

    def blocks(self, worker: Worker) -> int:
        """Distinct blocks in use."""
        return len(self._counts.get(worker, ()))

    def add(self, worker: Worker, keys: Sequence[int]) -> None:
        counts = self._counts.get(worker)
        if counts is None or not keys:
            return
        shared = _held(counts, keys)
        for key in keys[:shared]:
            counts[key] += 1
        fresh = keys[shared:]
        counts.update(zip(fresh, repeat(1)))
        holders, bit = self._holders, 1 << self._slots[worker]
        for key in fresh:
            holders[key] = holders.get(key, 0) | bit

    def remove(self, worker: Worker, keys: Sequence[int]) -> None:
        """Undo one `add` of the same keys."""
        counts = self._counts.get(worker)
        if counts is None or not keys or keys[-1] not in counts:
            return
        shared = _first_single(counts, keys)
        for key in keys[:shared]:
            counts[key] -= 1
        alone = keys[shared:]
        for key in alone:
            del counts[key]
        self._release(alone, ~(1 << self._slots[worker]))

    def depths(self, keys: Sequence[int], workers: Sequence[Worker]) -> list[int]:
        """How many leading keys are in use on each worker."""
        by_slot = self._depths(keys)
        if not by_slot:
            return [0] * len(workers)
        slots = self._slots
        return [by_slot.get(slots.get(worker, -1), 0) for worker in workers]

    def _depths(self, keys: Sequence[int]) -> dict[int, int]:
        holders, total = self._holders, len(keys)
        alive = holders.get(keys[0], 0) if total else 0
        depths: dict[int, int] = {}
        at = 1  # everybody in `alive` holds the first `at` keys
        for _ in range(_GROUPS):
            if not alive:
                return depths
            if holders.get(keys[total - 1], 0) & alive == alive:
                at = total
                break
            low, high = at, total - 1
            while high - low > 0:  # the deepest prefix that all of them hold
                middle = (low + high + 1) // 2
                if holders.get(keys[middle - 1], 0) & alive == alive:
                    low = middle
                else:
                    high = middle - 1
            at = low
            stay = holders.get(keys[at], 0) & alive
            _spread(depths, alive & ~stay, at)
            alive, at = stay, at + 1
        _spread(depths, alive, at)
        return depths

    def _release(self, keys: Sequence[int] | dict[int, int], mask: int) -> None:
        holders = self._holders
        for key in keys:
            if left := holders[key] & mask:
                holders[key] = left
            else:
                del holders[key]


def _held(counts: dict[int, int], keys: Sequence[int]) -> int:
    """How many leading keys are counted already."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] in counts:
            low = middle + 1
        else:
            high = middle
    return low


def _first_single(counts: dict[int, int], keys: Sequence[int]) -> int:
    """The first key that is counted once; all after it are, too."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if counts[keys[middle]] > 1:
            low = middle + 1
        else:
            high = middle
    return low


def _spread(depths: dict[int, int], mask: int, depth: int) -> None:
    while mask:
        bit = mask & -mask
        depths[bit.bit_length() - 1] = depth
        mask ^= bit
