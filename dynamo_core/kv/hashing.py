"""Names for KV blocks: one 64-bit key for each full block of a prompt, which stands for the block and everything before it.

For block `b` of tokens `t`, at depth `d` (from 0), with secret odd random numbers `m` and `M`, modulo 2**64:

    x[b] = sum_k m[k] * t[b, k]                     one integer product for all blocks
    g[b] = (M[d] * x[b] & ~0xFFFF) + 1              48 bits of hash, and 1 in the low bits, which thereby count the depth
    S[b] = S[b - 1] + g[b]                          one cumulative sum
    key  = byteswap(S[b])

A key *is* the state of its chain: a block is named from its parent's key alone, whoever named the parent. The byte swap puts hash bits where
dictionaries look first. The scheme is keyed and linear: good against accident and against whoever does not know the secret; not a
cryptographic hash. Two different blocks at one place collide with a probability of at most 2**-46; a collision can misplace a
request, and never changes an answer, because engines key their own caches.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynamo_core.kv.prehashed import Keys, Prehashed

try:
    from dynamo_kv_native import name_blocks
except ImportError:
    name_blocks = None
    """The same, compiled. Blocks with content are named here."""

Content = Sequence[tuple[int, int]]
"""`(block, digest)`: what a block holds besides tokens, such as the image behind placeholder tokens."""

MAX_DEPTH = 0xFFFF
"""Blocks that a chain can name; what follows is not indexed (a million tokens with blocks of 16)."""

_U = np.uint64
# As arrays without a dimension: numpy takes these in half the time of a scalar.
_HIGH = np.array(0xFFFF_FFFF_FFFF_0000, _U)
_ONE = np.array(1, _U)
_DEPTHS = np.array(MAX_DEPTH, _U)
_MASK = 0xFFFF_FFFF_FFFF_FFFF
_EMPTY: Keys = np.empty(0, _U)
_SWAP = sys.byteorder == "little"


class Hasher:
    """Names the blocks of one fleet: everybody with the same secret and block size gives the same keys."""

    def __init__(self, secret: bytes, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"a block has at least one token, not {block_size}")
        self.block_size = block_size
        self._secret = hashlib.blake2b(secret, digest_size=32, person=b"dynamo kv keys").digest()
        self.fingerprint = int.from_bytes(self._mac(b"fingerprint"), "little") & (_MASK >> 1)
        """Tells secrets apart without giving them away."""
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(int.from_bytes(self._secret, "little"))))
        self._per_token = draw.integers(0, 2**64, size=block_size, dtype=_U) | _ONE
        self._per_depth = draw.integers(0, 2**64, size=MAX_DEPTH, dtype=_U) | _ONE
        self._content = int(draw.integers(0, 2**64, dtype=_U)) | 1

    def _mac(self, text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=8, key=self._secret).digest()

    def root(self, adapter: str | None = None, cache_salt: str | None = None) -> int:
        """Where the prompts of this adapter and salt start: they share no key with those of another."""
        if adapter is None and cache_salt is None:
            return 0
        return _swapped(int.from_bytes(self._mac(repr((adapter, cache_salt)).encode()), "little") & int(_HIGH))

    def keys(self, token_ids: Sequence[int], parent: int = 0, content: Content = ()) -> Keys:
        """One key for each full block of `token_ids`, which follow the block (or root) `parent`.

        :raises OverflowError: a token id is negative or not a 64-bit number. :raises TypeError: one is not a number.
        """
        width = self.block_size
        if type(token_ids) is Prehashed:
            return token_ids.keys_of(width)
        if name_blocks is not None and not content:
            if type(token_ids) is list:
                tokens = array("Q", token_ids)
            else:
                tokens = token_ids if type(token_ids) is array and token_ids.typecode == "Q" else np.ascontiguousarray(token_ids, _U)
            return np.frombuffer(keys, _U) if (keys := name_blocks(tokens, self._per_token, self._per_depth, parent)) else _EMPTY
        tokens = np.frombuffer(array("Q", token_ids), _U) if type(token_ids) is list else np.asarray(token_ids, _U)
        start = _swapped(parent) if parent else 0
        depth = start & MAX_DEPTH
        count = min(len(tokens) // width, MAX_DEPTH - depth)
        if count <= 0:
            return _EMPTY
        sums: Keys = np.dot(tokens[: count * width].reshape(count, width), self._per_token)
        if content:
            self._mix_in(content, sums)
        sums *= self._per_depth[depth : depth + count]
        sums &= _HIGH
        sums += _ONE
        if start:
            sums[:1] += _U(start)
        np.add.accumulate(sums, 0, None, sums)
        return sums.byteswap(True) if _SWAP else sums

    def _mix_in(self, content: Content, sums: Keys) -> None:
        for block, digest in content:
            if 0 <= block < len(sums):
                sums[block : block + 1] += _U((digest | 1) * self._content & _MASK)


def depth_of(key: int) -> int:
    """How many blocks the chain of `key` has."""
    return _swapped(key) & MAX_DEPTH


def depths_of(keys: Keys) -> Keys:
    """`depth_of` for many."""
    return (keys.byteswap() if _SWAP else keys) & _DEPTHS


def digest_of(value: Any) -> int:
    """A 64-bit digest of what identifies a piece of content: a hash by whoever hashed it, as text, bytes or number."""
    if isinstance(value, int):
        return value & _MASK
    raw = value if isinstance(value, bytes) else str(value).encode()
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def content_of(media: Iterable[Mapping[str, Any]], block_size: int) -> list[tuple[int, int]]:
    """The blocks that media of a request reach into. An entry counts when it says `digest`, and `start` and `length` in prompt tokens."""
    found: list[tuple[int, int]] = []
    for item in media:
        if (digest := item.get("digest")) is not None:
            start, length = int(item.get("start", 0)), int(item.get("length", 1))
            blocks = range(start // block_size, (start + max(1, length) - 1) // block_size + 1)
            found += [(block, digest_of(digest)) for block in blocks]
    return found


def _swapped(key: int) -> int:
    return int.from_bytes(key.to_bytes(8, "big"), "little") if _SWAP else key
