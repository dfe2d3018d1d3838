"""A prompt of which only the keys of its blocks are known: what a request trace without tokens gives, and all that routing needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from dynamo_core.kv.hashing import Keys


class Prehashed(Sequence[int]):
    """Stands for `RoutingRequest.token_ids`. It has a length and keys; whoever asks for a token gets a `TypeError`."""

    __slots__ = ("_tokens", "block_size", "keys")

    def __init__(self, keys: Keys, tokens: int, block_size: int) -> None:
        """:param keys: one for each full block, as `Hasher.keys` would give them. :param tokens: length of the prompt."""
        if len(keys) != tokens // block_size:
            raise ValueError(f"{tokens} tokens are {tokens // block_size} full blocks of {block_size}, and there are {len(keys)} keys")
        self.keys = keys
        self.block_size = block_size
        self._tokens = tokens

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError("this prompt has no tokens, only the keys of its blocks")
