"""The grid: prompts of several lengths alone, and sequences of several lengths in batches of several sizes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median

import attrs

from dynamo_core.errors import Unavailable
from dynamo_planner.performance.profile import DecodePoint, PrefillPoint
from dynamo_planner.profiling.targets import Target, Timeline


@attrs.frozen
class Grid:
    inputs: Sequence[int] = (128, 512, 1024, 2048, 4096, 8192)
    """Prompt lengths that are read alone, in tokens."""
    contexts: Sequence[int] = (512, 2048, 8192)
    """Mean sequence lengths while decoding, in tokens."""
    concurrencies: Sequence[int] = (1, 4, 16, 64)
    output: int = 64
    """Tokens that each sequence generates while it is timed."""
    repeat: int = 3
    """Times that each prompt is read; the median counts."""


async def measure(target: Target, grid: Grid, said: Callable[[str], None]) -> tuple[tuple[PrefillPoint, ...], tuple[DecodePoint, ...]]:
    """Drive `target` over the grid. What does not fit in its cache is left out. :param said: takes a line for people about each point."""
    await target.ask(min(grid.inputs), 2)  # the first request of a process pays for much that later ones do not
    prefill: list[PrefillPoint] = []
    for tokens in grid.inputs:
        seconds = median([(line := await target.ask(tokens, 1)).first - line.asked for _ in range(grid.repeat)])
        prefill.append(PrefillPoint(tokens, seconds))
        said(f"prefill: {tokens} tokens in {seconds * 1000:.1f} ms")
    decode: list[DecodePoint] = []
    for context in grid.contexts:
        for concurrency in grid.concurrencies:
            if too_much := _too_much(target, context, concurrency):
                said(f"decode: {concurrency} sequences of {context} tokens: left out, {too_much}")
                continue
            itl = await _together(target, context, concurrency, grid.output)
            decode.append(DecodePoint(context, concurrency, itl))
            said(f"decode: {concurrency} sequences of {context} tokens: {itl * 1000:.2f} ms a token")
    if not decode:
        raise Unavailable("no point of the grid fits in the engine; choose smaller contexts")
    return tuple(prefill), tuple(decode)


def _too_much(target: Target, context: int, concurrency: int) -> str:
    if target.max_sequences is not None and concurrency > target.max_sequences:
        return f"the engine decodes {target.max_sequences} at once"
    if target.kv_tokens is not None and concurrency * context * 1.1 > target.kv_tokens:
        return f"its cache holds {target.kv_tokens} tokens"
    return ""


async def _together(target: Target, context: int, concurrency: int, output: int) -> float:
    """Seconds between tokens while all sequences decode: after the last has its first token, before the first has its last.

    Prompts are read one after the other, and meanwhile the first sequences go on; so they generate until the last has joined and been timed.
    """
    prompt = max(1, context - output // 2)
    alone = await target.ask(prompt, 2)
    joining = concurrency * (alone.first - alone.asked)
    itl = max(1e-4, alone.last - alone.first)
    tokens = output + min(4 * output, int(joining / itl))
    lines = await asyncio.gather(*(target.ask(prompt, tokens) for _ in range(concurrency)))
    return between_tokens(lines)


def between_tokens(lines: Sequence[Timeline]) -> float:
    """The mean over all streams of the time between tokens while all of them run; where they never all run, the median of what each saw."""
    begin, end = max(line.first for line in lines), min(line.last for line in lines)
    inside = [sum(tokens for at, tokens in line.arrivals if begin < at <= end) for line in lines]
    if end > begin and min(inside) >= 4:
        return (end - begin) * len(lines) / sum(inside)
    own = [(line.last - line.first) / generated for line in lines if (generated := sum(tokens for _, tokens in line.arrivals[1:])) > 0]
    if not own:
        raise Unavailable("the answers have no second token; let more be generated")
    return median(own)
