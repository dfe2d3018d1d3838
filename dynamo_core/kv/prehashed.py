"""A prompt of which only the keys of its blocks are known: all that routing needs, and what a request trace or another frontend gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
"""One 64-bit key for each full block of a prompt."""


class Prehashed(Sequence[int]):
    """Stands for `RoutingRequest.token_ids`. It has a length and keys; whoever asks for a token gets a `TypeError`."""

    __slots__ = ("_keys", "_tokens", "block_size", "fingerprint")

    def __init__(self, keys: Keys, tokens: int, block_size: int, fingerprint: int = 0) -> None:
        """:param keys: one for each full block; any secret, adapter and salt are part of them already. :param tokens: length of the prompt.

        :param fingerprint: of the hasher that made the keys; 0 when nobody else has keys to compare with them.
        """
        if len(keys) != tokens // block_size:
            raise ValueError(f"{tokens} tokens are {tokens // block_size} full blocks of {block_size}, and there are {len(keys)} keys")
        self._keys = keys
        self.block_size = block_size
        self.fingerprint = fingerprint
        self._tokens = tokens

    def keys_of(self, block_size: int) -> Keys:
        """:raises ValueError: the keys are of blocks of another size."""
        if block_size != self.block_size:
            raise ValueError(f"this prompt has keys for blocks of {self.block_size} tokens, not of {block_size}")
        return self._keys

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError("this prompt has no tokens, only the keys of its blocks")
