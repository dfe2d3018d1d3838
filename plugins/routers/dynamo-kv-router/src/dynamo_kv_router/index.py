"""Which worker holds how long a prefix.

It relies on one property: a worker that holds a block holds everything before it. `dynamo_core.kv.Chains` makes sure of it, whatever the
engine evicts. Then the workers that hold the last block of a prompt hold all of it, and the depth of each other worker is found by
probing, not by walking.

A level (device, host, ...) has a store of its own, which knows workers by their slots: small numbers that are used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynamo_core.kv import LEVELS, Change, Op
from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.contract import Worker
from dynamo_kv_router.store import Choice, Depths, Store, kind_of

SENT = len(LEVELS)
"""A level of its own for what workers are only believed to hold, because it was sent to them."""


class Index:
    """Bounded: `limit` keys a level; beyond it the oldest are forgotten, so that overlaps are under-, never overstated."""

    def __init__(self, limit: int = 8_000_000, shards: int | None = None, store: Choice = "auto") -> None:
        """:param shards: a power of two; by default as many as keep each short of what the store can do at once.

        :raises ValueError: the store is not installed.
        """
        self.kind = kind_of(store)
        shards = min(1 << (limit // self.kind.shard).bit_length(), 2**16) if shards is None else shards
        if not 1 <= shards <= 2**16 or shards & (shards - 1):
            raise ValueError(f"the number of shards must be a power of two, at most 65536, not {shards}")
        self._limit = limit
        self._shards = shards
        self._store: dict[int, Store] = {0: self.kind.make(shards, max(1, limit // shards))}
        self._slots: dict[Worker, int] = {}
        self._free: list[int] = []
        self._used = 0
        self._live = 0
        """Mask of the slots whose bits count."""
        self._touched = 0
        """Mask of the slots that something was added to since they were given: clearing one of the others takes no new slot."""
        self._dead = 0
        """Slots that left: their bits are swept shard by shard, and then they can be given to another worker."""
        self._late = 0
        """Slots that left while the present sweep was under way: they wait for the next one."""
        self._swept = 0
        self._levels: Sequence[int] = [0]
        """Levels that hold something."""
        self._rows: NDArray[np.intp] = np.empty(0, np.intp)
        self._rows_of: Sequence[Worker] | None = None

    def __len__(self) -> int:
        """Keys in all levels together."""
        return sum(map(len, self._store.values()))

    @property
    def forgotten(self) -> int:
        """Keys dropped for want of room, ever."""
        return sum(store.forgotten for store in self._store.values())

    # -------------------------------------------------------------- workers

    def join(self, worker: Worker) -> None:
        """Give the worker a place. Joining again changes nothing."""
        if worker not in self._slots:
            if self._free:
                slot = self._free.pop()
            else:
                slot, self._used = self._used, self._used + 1
            self._slots[worker] = slot
            self._live |= 1 << slot
            self._rows_of = None

    def drop_worker(self, worker: Worker) -> None:
        """Forget all of a worker, at once: its bit does not count any more, and is swept up later, a shard at a time."""
        if (slot := self._slots.pop(worker, None)) is not None:
            self._live &= ~(1 << slot)
            self._touched &= ~(1 << slot)
            self._rows_of = None
            if self._dead:
                self._late |= 1 << slot
            else:
                self._dead = 1 << slot

    def clear(self, worker: Worker) -> None:
        """The worker stays and holds nothing."""
        if (slot := self._slots.get(worker)) is not None and self._touched >> slot & 1:
            self.drop_worker(worker)
            self.join(worker)

    def tidy(self, shards: int = 1) -> None:
        """Sweep up after workers that left. Called by every change; call it yourself only to have it done sooner."""
        for _ in range(shards if self._dead else 0):
            for level in self._levels:
                self._store[level].sweep(self._swept, self._dead)
            self._swept += 1
            if self._swept == self._shards:
                self._free += [slot for slot in range(self._used) if self._dead >> slot & 1]
                self._dead, self._late, self._swept = self._late, 0, 0
                if not self._dead:
                    break

    @property
    def width(self) -> int:
        return self._used

    def rows(self, workers: Sequence[Worker]) -> NDArray[np.intp]:
        """The slot of each worker; one that never joined gets a slot that nobody has."""
        if workers is not self._rows_of:
            self._rows = np.array([self._slots.get(worker, self._used) for worker in workers], np.intp)
            self._rows_of = workers
        return self._rows

    # -------------------------------------------------------------- changes

    def add(self, worker: Worker, keys: Keys, level: int = 0) -> None:
        if (slot := self._slots.get(worker)) is not None:
            if (store := self._store.get(level)) is None:
                store = self._store[level] = self.kind.make(self._shards, max(1, self._limit // self._shards))
                self._levels = sorted(self._store)
            self._touched |= 1 << slot
            store.add(keys, slot)
            self.tidy()

    def remove(self, worker: Worker, keys: Keys, level: int = 0) -> None:
        if (slot := self._slots.get(worker)) is not None and (store := self._store.get(level)) is not None:
            store.remove(keys, slot)
            self.tidy()

    def apply(self, worker: Worker, change: Change) -> None:
        if change.op is Op.ADD:
            self.add(worker, change.keys, change.level)
        elif change.op is Op.REMOVE:
            self.remove(worker, change.keys, change.level)
        else:
            self.clear(worker)

    # -------------------------------------------------------------- lookup

    @property
    def levels(self) -> Sequence[int]:
        """Levels that have ever held something, the device always."""
        return self._levels

    def depths(self, keys: Keys, workers: Sequence[Worker], level: int = 0, *, sent: bool = False) -> Depths:
        """Blocks of the chain `keys` that each worker holds at `level` and nearer, and by what it was `sent`. Exact."""
        others = tuple([self._store[known] for known in self._levels if 0 < known <= level or (sent and known == SENT)])
        return self._by_slot(keys, others, self._live)[self.rows(workers)]

    def depth(self, worker: Worker, keys: Keys) -> int:
        """Blocks of the chain that one worker holds on its device."""
        if (slot := self._slots.get(worker)) is None:
            return 0
        return int(self._by_slot(keys, (), 1 << slot)[slot])

    def _by_slot(self, keys: Keys, others: tuple[Store, ...], live: int) -> Depths:
        """One more than there are slots, of depth 0: for workers that have none."""
        depths = np.zeros(self._used + 1, np.int32)
        self._store[0].depths(keys, others, live, depths)
        return depths
