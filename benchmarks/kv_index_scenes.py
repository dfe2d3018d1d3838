"""What is looked up and stored in the comparison of KV indexes, the same for both sides. Standard library only: the peer runs it, too."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterable

BLOCK = 16
KINDS = ("system prompt", "whole prompt", "miss", "all differ")
NOISE = 2000
"""Other prompts of 32 blocks in the index."""


def tokens(seed: int, blocks: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128_000) for _ in range(blocks * BLOCK)]


def depths(kind: str, workers: int, blocks: int) -> list[int]:
    """Blocks of the prompt that each worker holds."""
    rng = random.Random(workers * blocks)
    match kind:
        case "whole prompt":
            return [blocks] * workers
        case "all differ":
            return [rng.randrange(1, blocks + 1) for _ in range(workers)]
        case "system prompt":
            return [blocks * 9 // 10, *[min(blocks, 8)] * (workers - 1)]
        case _:
            return [0] * workers


def hashes(seed: int, blocks: int) -> list[int]:
    """The engine's own names of blocks."""
    return list(struct.unpack(f"{blocks}Q", random.Random(seed).randbytes(8 * blocks)))


def lower_quartile(call: Callable[[], object], calls: int) -> float:
    """Microseconds a call, by the wall."""
    taken: list[int] = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        call()
        taken.append(time.perf_counter_ns() - began)
    return sorted(taken)[len(taken) // 4] / 1e3


def calls_for(blocks: int) -> int:
    return max(40, 20_000 // blocks)


def compared(ours: Iterable[float], theirs: float, digits: int = 0) -> str:
    """Each of ours, the peer's, and the ratios; ours alone when the peer was not measured."""
    ours = list(ours)
    figures = ", ".join(f"{figure:.{digits}f}" for figure in ours)
    return figures if theirs == float("inf") else f"{figures} / {theirs:.{digits}f} = {', '.join(f'{figure / theirs:.2f}' for figure in ours)}"
