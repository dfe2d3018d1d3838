"""Which blocks an engine has, what they are called, and which follow which.

Engines store blocks in runs, one below the other, and evict them from the end. So that is how they are kept: a block leads to its run, which
says its key and what follows it. Links are kept only where a run does not say it: between runs, at branches, and for *ghosts*, blocks that
are gone while blocks below them are still there.

`dynamo-kv-native` has the same, compiled.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from itertools import repeat

import attrs

from dynamo_core.kv.prehashed import Keys

Hash = int
"""64 bits."""

_LENGTH = 64
"""Blocks of a run at most: one is found in it by looking at all."""


@attrs.define(eq=False)
class _Run:
    hashes: list[Hash]
    keys: array[int]
    holes: bool = False
    """Blocks within it may be gone, and may be elsewhere by now."""

    def place(self, h: Hash) -> int:
        hashes = self.hashes
        return len(hashes) - 1 if hashes[-1] == h else hashes.index(h)


class Blocks:
    """Blocks by the engine's own hashes."""

    def __init__(self) -> None:
        self._runs: dict[Hash, _Run] = {}
        self._next: dict[Hash, Hash] = {}
        """A child, where the run does not say it. It may be gone: children are looked up in `_runs` before they count."""
        self._more: dict[Hash, set[Hash]] = {}
        """Further children."""

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, h: object) -> bool:
        return h in self._runs

    def key(self, h: Hash) -> int:
        """:raises KeyError: it is not here."""
        run = self._runs[h]
        return run.keys[run.place(h)]

    def children(self, h: Hash) -> list[Hash]:
        """Of a block that is here, or of a ghost."""
        runs = self._runs
        found = [child for child in (self._next.get(h), *self._more.get(h, ())) if child is not None and child in runs]
        if (run := runs.get(h)) is not None and (after := run.place(h) + 1) < len(run.hashes) and runs.get(child := run.hashes[after]) is run:
            found.append(child)
        return found

    def keys(self, without: Collection[Hash]) -> bytes:
        """Of all blocks but some, 8 bytes each in this machine's order."""
        found = array("Q")
        for run in set(self._runs.values()):
            if not without and not run.holes:
                found += run.keys
                continue
            found.extend(key for h, key in zip(run.hashes, run.keys, strict=True) if h not in without and self._runs.get(h) is run)
        return found.tobytes()

    # -------------------------------------------------------------- changes

    def store(self, hashes: array[Hash], parent: Hash | None, keys: Keys) -> bool:
        """Blocks, one below the other. False, and nothing has changed, where one of them is here or a ghost, or comes twice. :param parent: is here."""
        runs, count = self._runs, len(hashes)
        if not runs.keys().isdisjoint(hashes) or not self._next.keys().isdisjoint(hashes):
            return False
        if count > _LENGTH:
            if len(set(hashes)) < count:
                return False
            for start in range(0, count, _LENGTH):
                self.store(hashes[start : start + _LENGTH], parent, keys[start : start + _LENGTH])
                parent = hashes[min(start + _LENGTH, count) - 1]
            return True
        before, run = len(runs), self._run_for(hashes, parent)
        runs.update(zip(hashes, repeat(run)))
        if len(runs) - before < count:
            for h in hashes:
                runs.pop(h, None)
            return False
        run.hashes += hashes
        run.keys.frombytes(keys.tobytes())
        return True

    def store_one(self, h: Hash, parent: Hash | None, key: int) -> None:
        """A block that is not here. It may be a ghost. :param parent: is here."""
        run = self._runs[h] = self._run_for([h], parent)
        run.hashes.append(h)
        run.keys.append(key)

    def _run_for(self, hashes: Sequence[Hash], parent: Hash | None) -> _Run:
        if parent is not None:
            run = self._runs[parent]
            if run.hashes[-1] == parent and not run.holes and parent not in self._next and len(run.hashes) + len(hashes) <= _LENGTH:
                return run
            self._adopt(parent, hashes[0])
        return _Run([], array("Q"))

    def drop(self, h: Hash) -> tuple[int, Sequence[Hash]]:
        """Its key, and its children, which stay. :raises KeyError: it is not here."""
        run = self._runs[h]
        if run.hashes[-1] == h and h not in self._next:
            del self._runs[h], run.hashes[-1]
            key = run.keys.pop()
            if run.holes:
                self._shorten(run)
            return key, ()
        children = self.children(h)
        del self._runs[h]
        place = run.place(h)
        key = run.keys[place]
        run.holes = True
        self._shorten(run)
        self._next.pop(h, None)
        self._more.pop(h, None)
        for child in children:
            self._adopt(h, child)
        if len(self._next) > 2 * len(self._runs) + 1024:
            self._forget_ghosts()
        return key, children

    def _shorten(self, run: _Run) -> None:
        while run.hashes and self._runs.get(run.hashes[-1]) is not run:
            del run.hashes[-1], run.keys[-1]

    def _adopt(self, parent: Hash, child: Hash) -> None:
        first = self._next.setdefault(parent, child)
        if first != child:
            if first not in self._runs:
                self._next[parent] = child
                return
            more = self._more.setdefault(parent, set())
            more.add(child)
            if len(more) >= 64 and not len(more) & (len(more) - 1):
                self._more[parent] = {child for child in more if child in self._runs}

    def _forget_ghosts(self) -> None:
        """Links of blocks that are gone lead to what is left below them; drop those that lead nowhere."""
        here = self._runs
        self._next = {h: child for h, child in self._next.items() if h in here or child in here or any(c in here for c in self._more.get(h, ()))}
        self._more = {h: children for h, children in self._more.items() if h in self._next}
