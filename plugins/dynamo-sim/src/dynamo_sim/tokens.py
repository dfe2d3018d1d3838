"""Which token comes next: a function of a seed and of the whole sequence so far, and of nothing else.

So an answer is the same alone or in a crowd, before or after a preemption, and on another worker that continues it. The
state is a polynomial hash modulo 2**64, computed for a prompt at once and rolled by one multiplication a token:

    state = (state + token) * MULTIPLIER + INCREMENT;    next token = words[(state >> 48) % len(words)]
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

MULTIPLIER = 6364136223846793005
INCREMENT = 1442695040888963407
MASK = 2**64 - 1

_UInts = npt.NDArray[np.uint64]


def roll(state: int, token: int) -> int:
    """The state after one more token."""
    return ((state + token) * MULTIPLIER + INCREMENT) & MASK


def seed_state(*parts: object) -> int:
    """The state before the first token."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def absorb(state: int, tokens: array[int]) -> int:
    """The state after all of `tokens` (`array("I")`): the same as `roll` over each, in one pass."""
    n = len(tokens)
    if n == 0:
        return state
    powers, sums = _tables(n)
    values = np.frombuffer(tokens, dtype=np.uint32).astype(np.uint64)
    return (state * int(powers[n]) + int((values * powers[n:0:-1]).sum(dtype=np.uint64)) + INCREMENT * int(sums[n - 1])) & MASK


_powers: _UInts = np.ones(1, dtype=np.uint64)
_sums: _UInts = np.ones(1, dtype=np.uint64)


def _tables(n: int) -> tuple[_UInts, _UInts]:
    """Powers of the multiplier up to `n`, and their running sums, modulo 2**64; grown when a longer prompt comes."""
    global _powers, _sums
    if len(_powers) <= n:
        factors = np.full(max(2 * n, 4096), MULTIPLIER, dtype=np.uint64)
        factors[0] = 1
        _powers = np.multiply.accumulate(factors)
        _sums = np.add.accumulate(_powers)
    return _powers, _sums
