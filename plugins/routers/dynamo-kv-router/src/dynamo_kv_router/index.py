"""Which worker holds how long a prefix: `{prefix key: bit mask of workers}`, in pure Python.

It relies on one property: a worker that holds a block holds everything before it. `dynamo_core.kv.Chains` makes sure of it, whatever the
engine evicts. Then the workers that hold the last block of a prompt hold all of it, and the depth of each other worker is found by
probing, not by walking.

Keys are spread over many small dictionaries, because a dictionary that grows copies itself: one of a million keys stops the process for
60 ms, one of twenty thousand for less than one. A level (device, host, ...) has a store of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, repeat
from operator import call, itemgetter, or_

import numpy as np
from numpy.typing import NDArray

from dynamo_core.kv import LEVELS, Change, Op
from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.contract import Worker

Group = tuple[int, int]
"""Depth in blocks, and the mask of the workers whose prefix ends there."""
Depths = NDArray[np.int32]

SENT = len(LEVELS)
"""A level of its own for what workers are only believed to hold, because it was sent to them."""


class Store:
    """One level. Knows slots (bits), not workers."""

    def __init__(self, shards: int, room: int) -> None:
        """:param room: keys that one shard may hold; when it has more, its oldest eighth is forgotten."""
        self.room = room
        self._mask = np.uint64(shards - 1)
        self._shift = np.uint64(_shift(shards - 1))
        self._shards: list[dict[int, int]] = [{} for _ in range(shards)]
        self._setdefault = [shard.setdefault for shard in self._shards]
        self._pop = [shard.pop for shard in self._shards]
        self.get = [shard.get for shard in self._shards]
        """By shard."""
        self.forgotten = 0
        """Keys dropped for want of room."""
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def shards_of(self, keys: Keys) -> list[int]:
        return ((keys >> self._shift) & self._mask).tolist()

    def add(self, keys: Keys, bit: int) -> None:
        names, shards = keys.tolist(), self.shards_of(keys)
        masks = _each(self._setdefault, shards, names, bit)
        if masks.count(bit) != len(masks):
            old = new = 0
            for shard, key, mask in zip(shards, names, masks, strict=True):
                if not mask & bit:
                    if mask != old:
                        # Neighbours mostly have the same holders: they share one number.
                        old, new = mask, mask | bit
                    self._shards[shard][key] = new

    def remove(self, keys: Keys, bit: int) -> None:
        names, shards = keys.tolist(), self.shards_of(keys)
        masks = _each(self._pop, shards, names, bit)
        if masks.count(bit) != len(masks):
            old = new = 0
            for shard, key, mask in zip(shards, names, masks, strict=True):
                if mask != bit:
                    if mask != old:
                        old, new = mask, mask & ~bit
                    self._shards[shard][key] = new

    def sweep(self, shard: int, dead: int) -> None:
        """Forget the workers of `dead` in one shard."""
        entries = self._shards[shard]
        for key in [key for key, mask in entries.items() if mask & dead]:
            if left := entries[key] & ~dead:
                entries[key] = left
            else:
                del entries[key]

    def keep_room(self, added: int) -> None:
        """Look at a few shards in turn, in step with what is added, and forget the oldest keys of those that are over their room."""
        for _ in range(1 + added // 16):
            self._turn = (self._turn + 1) % len(self._shards)
            shard = self._shards[self._turn]
            if len(shard) > self.room:
                for key in list(islice(shard, len(shard) - self.room + self.room // 8)):
                    del shard[key]
                    self.forgotten += 1


def _each(methods: Sequence[Callable[[int, int], int]], shards: Sequence[int], names: Sequence[int], mask: int) -> list[int]:
    """`methods[shard](name, mask)` of every name, without a loop in Python."""
    if len(names) < 2:
        return [methods[shard](name, mask) for shard, name in zip(shards, names, strict=True)]
    return list(map(call, itemgetter(*shards)(methods), names, repeat(mask)))  # pyright: ignore[reportArgumentType]


class Match:
    """What one prompt found: who holds how much of it."""

    __slots__ = ("_index", "groups")

    def __init__(self, index: Index, groups: list[Group]) -> None:
        self._index = index
        self.groups = groups
        """Each worker that holds at least one block is in exactly one group."""

    def depths(self, workers: Sequence[Worker]) -> Depths:
        """Blocks that each worker holds, in the order of `workers`."""
        rows = self._index.rows(workers)
        return _spread(self.groups, self._index.width)[rows] if self.groups else np.zeros(len(rows), np.int32)


class Index:
    """Bounded: `limit` keys a level (about 90 bytes each); beyond it the oldest are forgotten, so that overlaps are under-, never overstated."""

    def __init__(self, limit: int = 8_000_000, shards: int | None = None) -> None:
        """:param shards: a power of two; by default as many as keep each below 16,384 keys."""
        shards = 1 << (limit // 16384).bit_length() if shards is None else shards
        if not 1 <= shards <= 2**16 or shards & (shards - 1):
            raise ValueError(f"the number of shards must be a power of two, at most 65536, not {shards}")
        self._limit = limit
        self._shards = shards
        self._store: dict[int, Store] = {0: Store(shards, max(1, limit // shards))}
        self._slots: dict[Worker, int] = {}
        self._free: list[int] = []
        self._used = 0
        self._live = 0
        """Mask of the slots whose bits count."""
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
            self._rows_of = None
            if self._dead:
                self._late |= 1 << slot
            else:
                self._dead = 1 << slot

    def clear(self, worker: Worker) -> None:
        """The worker stays and holds nothing."""
        if worker in self._slots:
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
                store = self._store[level] = Store(self._shards, max(1, self._limit // self._shards))
                self._levels = sorted(self._store)
            store.add(keys, 1 << slot)
            store.keep_room(len(keys))
            self.tidy()

    def remove(self, worker: Worker, keys: Keys, level: int = 0) -> None:
        if (slot := self._slots.get(worker)) is not None and (store := self._store.get(level)) is not None:
            store.remove(keys, 1 << slot)
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

    def match(self, keys: Keys, level: int = 0, *, sent: bool = False) -> Match:
        """Who holds how much of the chain `keys`, counting what is at `level` and nearer, and what was `sent`. Exact."""
        gets = [self._store[known].get for known in self._levels if known <= level or (sent and known == SENT)]
        return Match(self, _groups(keys, gets, self._shards - 1, self._live))

    def depth(self, worker: Worker, keys: Keys) -> int:
        """Blocks of the chain that one worker holds on its device."""
        if (slot := self._slots.get(worker)) is None:
            return 0
        groups = _groups(keys, [self._store[0].get], self._shards - 1, 1 << slot)
        return groups[0][0] if groups else 0


def _groups(keys: Keys, gets: Sequence[Sequence[Callable[[int, int], int]]], shards: int, live: int) -> list[Group]:
    """Split the chain where the set of holders changes, by bisection: where both ends have the same holders, so has everything between."""
    last = len(keys) - 1
    if last < 0:
        return []
    probe = _prober(keys, gets, shards)
    lo, here = 0, probe(0) & live
    if not here:
        return []
    end = probe(last) & here if last else here
    groups: list[Group] = []
    right: list[Group] = [(last, end)]
    """Positions beyond `lo` whose holders are known, the nearest last."""
    while right:
        hi, there = right[-1]
        if here == there:
            lo = hi
            right.pop()
        elif hi - lo == 1:
            groups.append((hi, here & ~there))
            lo, here = hi, there
            right.pop()
            if here and len(groups) == _MANY and lo < _MANY * _CLOSE:
                groups += _walk(keys[lo + 1 :], gets, shards, here, lo + 1)
                return groups
        else:
            mid = (lo + hi) >> 1
            between = probe(mid) & here
            if between == here:
                lo = mid
            elif between == there:
                right[-1] = (mid, there)
            else:
                right.append((mid, between))
    if here:
        groups.append((last + 1, here))
    return groups


_MANY, _CLOSE = 6, 20
"""After `_MANY` groups, on average less than `_CLOSE` blocks apart, it is cheaper to read what is left than to probe it."""


def _prober(keys: Keys, gets: Sequence[Sequence[Callable[[int, int], int]]], shards: int) -> Callable[[int], int]:
    """The mask of a block by its position, over all levels."""
    item = keys.item
    shift = _shift(shards)
    if len(gets) == 1:
        (get,) = gets

        def one(i: int) -> int:
            key: int = item(i)
            return get[key >> shift & shards](key, 0)

        return one

    def several(i: int) -> int:
        key: int = item(i)
        mask = 0
        for get in gets:
            mask |= get[key >> shift & shards](key, 0)
        return mask

    return several


def _walk(keys: Keys, gets: Sequence[Sequence[Callable[[int, int], int]]], shards: int, here: int, depth: int) -> list[Group]:
    """The groups of what is left of a chain, block by block."""
    names = keys.tolist()
    places: list[int] = (keys >> np.uint64(_shift(shards)) & np.uint64(shards)).tolist()
    masks = _each(gets[0], places, names, 0)
    for get in gets[1:]:
        masks = list(map(or_, masks, _each(get, places, names, 0)))
    groups: list[Group] = []
    for i, mask in enumerate(masks):
        if mask & here != here:
            left = mask & here
            groups.append((depth + i, here & ~left))
            here = left
            if not here:
                return groups
    groups.append((depth + len(masks), here))
    return groups


def _shift(shards: int) -> int:
    """Keys end, at the top, in 16 bits of depth; the bits below them choose the shard."""
    return 48 - shards.bit_length()


def _spread(groups: Sequence[Group], width: int) -> Depths:
    """Depth by slot; one more slot, for workers that have none, has depth 0."""
    depths = np.zeros(width + 1, np.int32)
    size = (width + 7) >> 3
    if len(groups) <= 4:
        for depth, mask in groups:
            if mask & (mask - 1):
                bits = np.unpackbits(np.frombuffer(mask.to_bytes(size, "little"), np.uint8), count=width, bitorder="little")
                depths[:width][bits.view(bool)] = depth
            else:
                depths[mask.bit_length() - 1] = depth
        return depths
    masks = np.frombuffer(b"".join([mask.to_bytes(size, "little") for _, mask in groups]), np.uint8)
    found = masks.nonzero()[0]
    row, bit = np.unpackbits(masks[found].reshape(-1, 1), axis=1, bitorder="little").nonzero()
    place = found[row]
    depths[place % size * 8 + bit] = np.array([depth for depth, _ in groups], np.int32)[place // size]
    return depths
