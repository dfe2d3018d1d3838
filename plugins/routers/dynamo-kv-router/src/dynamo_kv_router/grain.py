"""A coarser index: of every chain only each n-th block is kept, which stands for the n blocks up to it.

A key is present only when everything before it is, and says how deep it lies, so that the others can simply be left out: nothing is estimated,
and what the index then says of a prompt is rounded down to whole grains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from dynamo_core.kv import Change
from dynamo_core.kv.hashing import Keys, depths_of


class Grain:
    """:param tokens: that one kept key stands for; 0, or less than two blocks: a block."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self.blocks = max(1, tokens // block_size)
        self.tokens = self.blocks * block_size

    def of_prompt(self, keys: Keys) -> Keys:
        """Of the keys of a prompt, in order and from its first block on, those that are kept."""
        return keys if self.blocks == 1 else np.ascontiguousarray(keys[self.blocks - 1 :: self.blocks])

    def of_changes(self, changes: Iterable[Change]) -> Iterator[Change]:
        """The changes that concern kept keys. A change without keys is passed on."""
        if self.blocks == 1:
            yield from changes
            return
        for op, level, keys in changes:
            kept = keys[depths_of(keys) % self.blocks == 0]
            if len(kept) or not len(keys):
                yield Change(op, level, kept)
