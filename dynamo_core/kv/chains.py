"""From what an engine reports to what a router can rely on.

Engines name blocks by hashes of their own, link them by parent, report a block twice when they hold two copies, evict inner blocks
before their descendants, and move blocks between storage tiers. Routers want one thing: sets of keys, one for each level, in which a
block is present only when everything before it is. This is where the one becomes the other.

Nearly all blocks have one copy on the device and all their ancestors there, too. Only those that have not, the *odd* ones, carry a state.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise, repeat

import attrs
import numpy as np

from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv.hashing import Hasher, Keys, digest_of
from dynamo_core.kv.wire import LEVELS, Change, Op

Hash = int | bytes

ABSENT = len(LEVELS)
"""The level of what cannot be reached."""
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
        self._key: dict[Hash, int] = {}
        self._odd: dict[Hash, _Odd] = {}
        self._next: dict[Hash, Hash] = {}
        """A child of each block. It may be gone: children are looked up in `_key` before they count."""
        self._more: dict[Hash, set[Hash]] = {}
        """Its other children."""
        self._out: list[tuple[Op, int, list[array[int] | Keys]]] = []

    def __len__(self) -> int:
        return len(self._key)

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
        if len(self._next) > 2 * len(self._key) + 1024:
            self._forget_ghosts()
        out, self._out = self._out, []
        return [Change(op, level, np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), np.uint64)) for op, level, parts in out]  # pyright: ignore[reportArgumentType]

    def picture(self) -> list[Change]:
        """Everything that is present, as additions."""
        keys: list[array[int]] = [array("Q") for _ in LEVELS]
        for h, odd in self._odd.items():
            if odd.level != ABSENT:
                keys[odd.level].append(self._key[h])
        odd = self._odd
        keys[0].extend(array("Q", [key for h, key in self._key.items() if h not in odd] if odd else list(self._key.values())))
        return [Change(Op.ADD, level, np.frombuffer(found, np.uint64)) for level, found in enumerate(keys) if found]

    def _apply(self, event: KvEvent) -> None:
        """:raises TypeError, ValueError, OverflowError: the event is malformed; nothing has changed."""
        match event:
            case BlocksStored():
                self._stored(event)
            case BlocksRemoved():
                frozenset(event.hashes)  # Raises before anything is changed, not halfway.
                self._removed([_plain(h) for h in event.hashes] if _signed(event.hashes) else event.hashes, _LEVEL_OF.get(event.tier, 3))
            case BlocksCleared():
                self._cleared()

    # -------------------------------------------------------------- stored

    def _stored(self, event: BlocksStored) -> None:
        hashes, parent, level = event.hashes, event.parent, _LEVEL_OF.get(event.tier, 3)
        if _signed(hashes) or (isinstance(parent, int) and parent < 0):
            hashes, parent = [_plain(h) for h in hashes], None if parent is None else _plain(parent)
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
        self._full = len(self._key) + count > self.limit
        if self._full:
            return
        if parent is None:
            start = self.hasher.root(event.adapter, event.cache_salt)
        elif (start := self._key.get(parent, -1)) < 0 or parent in hashes:
            self.unlinked += len(hashes)
            return
        content = [(block, digest_of(d)) for block, digests in enumerate(event.media) for d in digests]
        keys = self.hasher.keys(event.token_ids if isinstance(event.token_ids, list | array) else list(event.token_ids), start, content)
        if hashes := hashes[: len(keys)]:
            self._link(hashes, parent, keys, level)

    def _link(self, hashes: Sequence[Hash], parent: Hash | None, keys: Keys, level: int) -> None:
        known = self._key
        simple = level == 0 and (parent is None or parent not in self._odd)
        if simple and known.keys().isdisjoint(hashes) and self._next.keys().isdisjoint(hashes):
            before = len(known)
            known.update(zip(hashes, keys.tolist(), strict=True))
            if len(known) - before == len(hashes):
                self._next.update(pairwise(hashes))
                if parent is not None:
                    self._adopt(parent, hashes[0])
                self._emit(Op.ADD, 0, keys)
                return
            for h in hashes:  # The event names a block twice: start again, one by one.
                known.pop(h, None)
        for h, key in zip(hashes, keys.tolist(), strict=True):
            above = 0 if parent is None else self._level(parent)
            if h not in known:
                known[h] = key
                self._odd[h] = _Odd(above=above)
                if parent is not None:
                    self._adopt(parent, h)
            self._count(h, level, 1)
            parent = h

    def _stored_again(self, hashes: Sequence[Hash], level: int) -> None:
        """Copies of blocks that are known already; engines that move blocks between tiers report them without tokens."""
        for h in hashes:
            if h in self._key:
                self._count(h, level, 1)
            else:
                self.unlinked += 1

    def _adopt(self, parent: Hash, child: Hash) -> None:
        first = self._next.setdefault(parent, child)
        if first != child:
            if first not in self._key:
                self._next[parent] = child
                return
            more = self._more.setdefault(parent, set())
            more.add(child)
            if len(more) >= 64 and not len(more) & (len(more) - 1):
                self._more[parent] = {child for child in more if child in self._key}

    def _forget_ghosts(self) -> None:
        """Blocks that are gone are remembered for what is left below them; drop those below which nothing is left."""
        known = self._key
        self._next = {h: child for h, child in self._next.items() if h in known or child in known or any(c in known for c in self._more.get(h, ()))}
        self._more = {h: children for h, children in self._more.items() if h in self._next}

    # -------------------------------------------------------------- removed

    def _removed(self, hashes: Sequence[Hash], level: int) -> None:
        if level or (self._odd and not self._odd.keys().isdisjoint(hashes)) or (self._more and not self._more.keys().isdisjoint(hashes)):
            for h in hashes:
                if h in self._key:
                    self._count(h, level, -1)
            return
        keys = [key for key in map(self._key.pop, hashes, repeat(-1)) if key >= 0]
        children = list(map(self._next.pop, hashes, repeat(None)))
        if keys:
            self._emit(Op.REMOVE, 0, array("Q", keys))
        for h, child in zip(hashes, children, strict=True):
            if child is not None and child in self._key:
                self._next[h] = child
                self._below([(child, ABSENT)])

    def _cleared(self) -> None:
        for table in (self._key, self._odd, self._next, self._more):
            table.clear()
        self._out = [(Op.CLEAR, 0, [])]
        self._full = False

    # -------------------------------------------------------------- odd blocks

    def _level(self, h: Hash) -> int:
        odd = self._odd.get(h)
        return (0 if h in self._key else ABSENT) if odd is None else odd.level

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
        key = self._key[h]
        if was != odd.level:
            if was != ABSENT:
                self._emit(Op.REMOVE, was, array("Q", (key,)))
            if odd.level != ABSENT:
                self._emit(Op.ADD, odd.level, array("Q", (key,)))
        if own == ABSENT:
            del self._key[h], self._odd[h]
        elif odd.level == 0 and odd.copies[0] == 1 and not any(odd.copies[1:]):
            del self._odd[h]
        if was == odd.level and own != ABSENT:
            return []
        children = [child for child in (self._next.get(h), *self._more.get(h, ())) if child is not None and child in self._key]
        if own == ABSENT:
            # What it leaves behind waits below it, out of reach, until it is stored again.
            self._next.pop(h, None)
            self._more.pop(h, None)
            for child in children:
                self._adopt(h, child)
        return [(child, odd.level) for child in children]

    def _emit(self, op: Op, level: int, keys: array[int] | Keys) -> None:
        if self._out and self._out[-1][0] is op and self._out[-1][1] == level:
            self._out[-1][2].append(keys)
        else:
            self._out.append((op, level, [keys]))


def _signed(hashes: Sequence[Hash]) -> bool:
    return bool(hashes) and isinstance(hashes[0], int) and min(hashes) < 0  # pyright: ignore[reportOperatorIssue]


def _plain(h: Hash) -> Hash:
    """Some engines write 64-bit hashes as signed numbers in one place and as unsigned ones in another."""
    return h + 2**64 if isinstance(h, int) and h < 0 else h
