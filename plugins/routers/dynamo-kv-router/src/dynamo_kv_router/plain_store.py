"""The store of the index in pure Python: `{prefix key: mask of slots}`.

Keys are spread over many small dictionaries, because a dictionary that grows copies itself: one of a million keys stops the process for
60 ms, one of twenty thousand for less than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, repeat
from operator import call, itemgetter, or_

import numpy as np

from dynamo_core.kv.hashing import Keys
from dynamo_kv_router.store import Depths

Group = tuple[int, int]
"""Depth in blocks, and the mask of the slots whose prefix ends there."""


class PlainStore:
    """`Store` in pure Python."""

    def __init__(self, shards: int, room: int) -> None:
        """:param room: keys that one shard may hold; when it has more, its oldest eighth is forgotten."""
        self.room = room
        self._mask = np.uint64(shards - 1)
        self._shift = np.uint64(_shift(shards - 1))
        self._shards: list[dict[int, int]] = [{} for _ in range(shards)]
        self._setdefault = [shard.setdefault for shard in self._shards]
        self._pop = [shard.pop for shard in self._shards]
        self._get = [shard.get for shard in self._shards]
        self.forgotten = 0
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def add(self, keys: Keys, slot: int, /) -> None:
        bit = 1 << slot
        self._change(self._setdefault, keys, bit, bit.__or__)
        self._keep_room(len(keys))

    def remove(self, keys: Keys, slot: int, /) -> None:
        bit = 1 << slot
        self._change(self._pop, keys, bit, (~bit).__and__)

    def _change(self, methods: Sequence[Callable[[int, int], int]], keys: Keys, bit: int, changed: Callable[[int], int]) -> None:
        """Call the method of its shard for each key, as if nobody else held it; where its mask says otherwise, write what that becomes."""
        names, shards = keys.tolist(), ((keys >> self._shift) & self._mask).tolist()
        masks = _each(methods, shards, names, bit)
        if masks.count(bit) != len(masks):
            old = new = 0
            for shard, key, mask in zip(shards, names, masks, strict=True):
                if mask != bit:
                    if mask != old:
                        # Neighbours mostly have the same holders: they share one number.
                        old, new = mask, changed(mask)
                    self._shards[shard][key] = new

    def sweep(self, shard: int, dead: int, /) -> None:
        entries = self._shards[shard]
        for key in [key for key, mask in entries.items() if mask & dead]:
            if left := entries[key] & ~dead:
                entries[key] = left
            else:
                del entries[key]

    def depths(self, keys: Keys, others: tuple[PlainStore, ...], live: int, depths: Depths, /) -> None:
        if groups := _groups(keys, [self._get, *(other._get for other in others)], len(self._shards) - 1, live):
            _spread(groups, depths)

    def _keep_room(self, added: int) -> None:
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


def _spread(groups: Sequence[Group], depths: Depths) -> None:
    """Write the depth of each slot."""
    width = len(depths)
    size = (width + 7) >> 3
    if len(groups) <= 4:
        for depth, mask in groups:
            if mask & (mask - 1):
                bits = np.unpackbits(np.frombuffer(mask.to_bytes(size, "little"), np.uint8), count=width, bitorder="little")
                depths[bits.view(bool)] = depth
            else:
                depths[mask.bit_length() - 1] = depth
        return
    masks = np.frombuffer(b"".join([mask.to_bytes(size, "little") for _, mask in groups]), np.uint8)
    found = masks.nonzero()[0]
    row, bit = np.unpackbits(masks[found].reshape(-1, 1), axis=1, bitorder="little").nonzero()
    place = found[row]
    depths[place % size * 8 + bit] = np.array([depth for depth, _ in groups], np.int32)[place // size]
