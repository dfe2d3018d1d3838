"""From what an engine reports to what a router can rely on.

Engines name blocks by hashes of their own, link them by parent, report a block twice when they hold two copies, evict inner blocks
before their descendants, and move blocks between storage tiers. Routers want one thing: sets of keys, one for each level, in which a
block is present only when everything before it is. This is where the one becomes the other.

Nearly all blocks have one copy on the device and all their ancestors there, too. Only those that have not, the *odd* ones, carry a state.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import attrs
import numpy as np

from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv import blocks as plain
from dynamo_core.kv.blocks import Hash
from dynamo_core.kv.hashing import Hasher, Keys, digest_of
from dynamo_core.kv.wire import LEVELS, Change, Op

try:
    from dynamo_kv_native import Blocks
except ImportError:
    Blocks = plain.Blocks

ABSENT = len(LEVELS)
"""The level of what cannot be reached."""
_64_BITS = 0xFFFF_FFFF_FFFF_FFFF
_LEVEL_OF = {name: level for level, name in enumerate(LEVELS)}


@attrs.define(eq=False)
class _Odd:
    """A block with several copies, with none on the device, or below one that is not on the device."""

    copies: list[int] = attrs.field(factory=lambda: [0] * len(LEVELS))
    above: int = 0
    """Level of the block before it."""
    level: int = ABSENT
    """At which it counts."""


class Chains:
    """The cache of one rank of one engine. Not thread-safe."""

    def __init__(self, hasher: Hasher, limit: int = 4_000_000) -> None:
        """:param limit: blocks to know; what the engine stores beyond that is left out, and `problem` says so."""
        self.hasher = hasher
        self.limit = limit
        self.unlinked = 0
        """Blocks left out because the block before them was never reported."""
        self.malformed = 0
        """Events left out because they cannot be read."""
        self._lie = ""
        self._full = False
        self._blocks = Blocks()
        self._odd: dict[Hash, _Odd] = {}
        self._out: list[tuple[Op, int, list[array[int] | Keys]]] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def problem(self) -> str:
        """Why the picture is not to be trusted; empty when it is."""
        if self._lie:
            return self._lie
        return f"the engine reports more than {self.limit} blocks; the rest is left out" if self._full else ""

    def apply(self, events: Iterable[KvEvent]) -> list[Change]:
        """What the events change for whoever follows the keys. Nonsense is left out; see `problem` and `unlinked`."""
        for event in events:
            try:
                self._apply(event)
            except (TypeError, ValueError, OverflowError):
                self.malformed += 1
        out, self._out = self._out, []
        return [Change(op, level, _together(parts)) for op, level, parts in out]

    def picture(self) -> list[Change]:
        """Everything that is present, as additions."""
        keys: list[array[int]] = [array("Q") for _ in LEVELS]
        for h, odd in self._odd.items():
            if odd.level != ABSENT:
                keys[odd.level].append(self._blocks.key(h))
        keys[0].frombytes(self._blocks.keys(self._odd))
        return [Change(Op.ADD, level, np.frombuffer(found, np.uint64)) for level, found in enumerate(keys) if found]

    def _apply(self, event: KvEvent) -> None:
        """:raises TypeError, ValueError, OverflowError: the event is malformed; nothing has changed."""
        match event:
            case BlocksStored():
                self._stored(event)
            case BlocksRemoved():
                self._removed(_numbers(event.hashes), _LEVEL_OF.get(event.tier, 3))
            case BlocksCleared():
                self._cleared()

    # -------------------------------------------------------------- stored

    def _stored(self, event: BlocksStored) -> None:
        hashes, level = _numbers(event.hashes), _LEVEL_OF.get(event.tier, 3)
        parent = None if event.parent is None else _number(event.parent)
        size = self.hasher.block_size
        if not len(event.token_ids):
            self._stored_again(hashes, level)
            return
        if event.block_size not in (None, size):
            self._lie = f"the engine reports blocks of {event.block_size} tokens, and its card says {size}"
            return
        count = len(event.token_ids) // size
        if not len(hashes) - 1 <= count <= len(hashes):
            self._lie = f"the engine reports {len(event.token_ids)} tokens in {len(hashes)} blocks, and its card says {size} tokens a block"
            return
        if count < len(hashes):
            hashes = hashes[:count]  # The last block is not full: nobody can share it.
        self._full = len(self._blocks) + count > self.limit
        if self._full:
            return
        if parent is None:
            start = self.hasher.root(event.adapter, event.cache_salt)
        else:
            try:
                start = self._blocks.key(parent)
            except KeyError:
                self.unlinked += len(hashes)
                return
        content = [(block, digest_of(d)) for block, digests in enumerate(event.media) for d in digests]
        keys = self.hasher.keys(event.token_ids if isinstance(event.token_ids, list | array) else list(event.token_ids), start, content)
        if hashes := hashes[: len(keys)]:
            self._link(hashes, parent, keys, level)

    def _link(self, hashes: array[int], parent: Hash | None, keys: Keys, level: int) -> None:
        if level == 0 and (parent is None or parent not in self._odd) and self._blocks.store(hashes, parent, keys):
            self._emit(Op.ADD, 0, keys)
            return
        if parent is not None and parent in hashes:
            self.unlinked += len(hashes)
            return
        for i, h in enumerate(hashes):
            above = 0 if parent is None else self._level(parent)
            if h not in self._blocks:
                self._blocks.store_one(h, parent, int(keys[i]))
                self._odd[h] = _Odd(above=above)
            self._count(h, level, 1)
            parent = h

    def _stored_again(self, hashes: array[int], level: int) -> None:
        """Copies of blocks that are known already; engines that move blocks between tiers report them without tokens."""
        for h in hashes:
            if h in self._blocks:
                self._count(h, level, 1)
            else:
                self.unlinked += 1

    # -------------------------------------------------------------- removed

    def _removed(self, hashes: array[int], level: int) -> None:
        if level or (self._odd and not self._odd.keys().isdisjoint(hashes)):
            for h in hashes:
                if h in self._blocks:
                    self._count(h, level, -1)
            return
        keys, below = array("Q"), list[Hash]()
        for h in hashes:
            try:
                key, children = self._blocks.drop(h)
            except KeyError:
                continue
            keys.append(key)
            below += children
        if keys:
            self._emit(Op.REMOVE, 0, keys)
        self._below([(child, ABSENT) for child in below if child in self._blocks])

    def _cleared(self) -> None:
        self._blocks = Blocks()
        self._odd.clear()
        self._out = [(Op.CLEAR, 0, [])]
        self._full = False

    # -------------------------------------------------------------- odd blocks

    def _level(self, h: Hash) -> int:
        odd = self._odd.get(h)
        return (0 if h in self._blocks else ABSENT) if odd is None else odd.level

    def _as_odd(self, h: Hash) -> _Odd:
        if (odd := self._odd.get(h)) is None:
            odd = self._odd[h] = _Odd([1, *[0] * (len(LEVELS) - 1)], 0, 0)
        return odd

    def _count(self, h: Hash, level: int, by: int) -> None:
        odd = self._as_odd(h)
        odd.copies[level] = max(0, odd.copies[level] + by)
        self._settle(h, odd)

    def _below(self, changed: list[tuple[Hash, int]]) -> None:
        """Tell blocks that the block before them counts at another level now, and those below them in turn."""
        while changed:
            h, above = changed.pop()
            odd = self._as_odd(h)
            odd.above = above
            changed += self._decide(h, odd)

    def _settle(self, h: Hash, odd: _Odd) -> None:
        self._below(self._decide(h, odd))

    def _decide(self, h: Hash, odd: _Odd) -> list[tuple[Hash, int]]:
        """Bring the level of a block up to date. Returns the children that this concerns, with its level."""
        own = next((level for level, copies in enumerate(odd.copies) if copies), ABSENT)
        was, odd.level = odd.level, max(own, odd.above) if own != ABSENT else ABSENT
        if was != odd.level:
            key = array("Q", (self._blocks.key(h),))
            if was != ABSENT:
                self._emit(Op.REMOVE, was, key)
            if odd.level != ABSENT:
                self._emit(Op.ADD, odd.level, key)
        if own == ABSENT:
            # What it leaves behind waits below it, out of reach, until it is stored again.
            del self._odd[h]
            return [(child, ABSENT) for child in self._blocks.drop(h)[1]]
        if odd.level == 0 and odd.copies[0] == 1 and not any(odd.copies[1:]):
            del self._odd[h]
        return [] if was == odd.level else [(child, odd.level) for child in self._blocks.children(h)]

    def _emit(self, op: Op, level: int, keys: array[int] | Keys) -> None:
        if self._out and self._out[-1][0] is op and self._out[-1][1] == level:
            self._out[-1][2].append(keys)
        else:
            self._out.append((op, level, [keys]))


def _together(parts: list[array[int] | Keys]) -> Keys:
    if len(parts) == 1:
        only = parts[0]
        return only if isinstance(only, np.ndarray) else np.frombuffer(only, np.uint64)
    return np.frombuffer(b"".join(parts), np.uint64)  # pyright: ignore[reportArgumentType]


def _numbers(hashes: Sequence[int | bytes]) -> array[int]:
    """:raises TypeError: something else is among them."""
    if type(hashes) is array and hashes.typecode == "Q":
        return hashes
    try:
        return array("Q", hashes)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (TypeError, OverflowError):
        return array("Q", [_number(h) for h in hashes])


def _number(h: int | bytes) -> int:
    """Some engines write 64-bit hashes as signed numbers in one place and as unsigned ones in another. Longer ones are cut as engines cut them themselves."""
    if isinstance(h, int):
        return h & _64_BITS
    if isinstance(h, bytes):
        return int.from_bytes(h[-8:], "big")
    raise TypeError(f"{h!r} is no hash of a block")
