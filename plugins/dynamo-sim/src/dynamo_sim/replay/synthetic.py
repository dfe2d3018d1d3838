"""Traces that nobody recorded: shared prefixes, chats, and agents. Deterministic by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dynamo_sim.replay.trace import BLOCK, Line, Trace, build


class _Text:
    """The blocks of a text that grows: full ones keep their ids, the last one is new whenever it has changed."""

    def __init__(self, ids: Iterator[int], prefix: tuple[int, ...] = ()) -> None:
        self._ids = ids
        self._full = list(prefix)
        self.tokens = len(prefix) * BLOCK

    def grow(self, tokens: int) -> list[int]:
        """Append so many tokens. Returns the ids of all blocks."""
        self.tokens += tokens
        while len(self._full) < self.tokens // BLOCK:
            self._full.append(next(self._ids))
        return [*self._full, next(self._ids)] if self.tokens % BLOCK else list(self._full)


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _lognormal(random: np.random.Generator, mean: float, sigma: float, low: int, high: int) -> int:
    return int(np.clip(random.lognormal(np.log(mean) - sigma * sigma / 2, sigma), low, high))


def prefixes(requests: int, *, rate: float = 3.0, prompts: int = 60, prefix: float = 5000, own: float = 1200, output: float = 250, seed: int = 0) -> Trace:
    """Applications with long system prompts of their own: some popular, most not, and a short question after it.

    :param rate: requests a second. :param prompts: different prefixes. :param prefix: and :param own: and :param output: mean tokens.
    """
    random, ids = np.random.default_rng(seed), _count()
    heads = [tuple(next(ids) for _ in range(max(1, _lognormal(random, prefix, 0.6, BLOCK, 40_000) // BLOCK))) for _ in range(prompts)]
    share = 1.0 / np.arange(1, prompts + 1) ** 0.9
    share /= share.sum()
    lines: list[Line] = []
    at = 0.0
    for _ in range(requests):
        at += random.exponential(1000.0 / rate)
        text = _Text(ids, heads[int(random.choice(prompts, p=share))])
        blocks = text.grow(_lognormal(random, own, 1.0, 8, 20_000))
        lines.append(Line(text.tokens, _lognormal(random, output, 0.8, 1, 4000), blocks, at))
    return build(lines, name="prefixes")


def chats(requests: int, *, rate: float = 3.0, turns: float = 5, first: float = 2500, more: float = 500, output: float = 300, seed: int = 0) -> Trace:
    """People who talk: each turn brings all turns before it, after a pause. One chat in three begins with a prefix that others share.

    :param rate: requests a second. :param turns: of a chat, and :param first: its opening, :param more: each later message, :param output: mean tokens.
    """
    random, ids = np.random.default_rng(seed), _count()
    heads = [tuple(next(ids) for _ in range(int(random.integers(1, 8)))) for _ in range(20)]
    lines: list[Line] = []
    begin = 0.0
    while len(lines) < requests * 1.2:
        begin += random.exponential(1000.0 * turns / rate)
        text = _Text(ids, heads[int(random.integers(len(heads)))] if random.random() < 1 / 3 else ())
        at = begin
        for turn in range(int(random.geometric(1.0 / turns))):
            blocks = text.grow(_lognormal(random, more if turn else first, 1.1, 8, 60_000))
            if text.tokens > 120_000:
                break
            answer = _lognormal(random, output, 0.8, 1, 4000)
            lines.append(Line(text.tokens, answer, blocks, at))
            text.grow(answer)
            at += random.lognormal(np.log(25_000), 0.9)
    lines.sort(key=lambda line: line.timestamp or 0.0)
    return build(lines[:requests], name="chats")


def agents(
    requests: int, *, rate: float = 3.0, kinds: int = 8, steps: float = 12, head: float = 6000, result: float = 900, output: float = 120, seed: int = 0
) -> Trace:
    """Programs that call a model in a loop: a long head shared by all agents of a kind, then a tool result after each short answer.

    A step begins when the one before it has ended and its tool has run, so that a slow fleet is asked less.

    :param rate: requests a second at first. :param steps: of an agent. :param head: and :param result: and :param output: mean tokens.
    """
    random, ids = np.random.default_rng(seed), _count()
    heads = [tuple(next(ids) for _ in range(max(1, _lognormal(random, head, 0.4, BLOCK, 40_000) // BLOCK))) for _ in range(kinds)]
    lines: list[Line] = []
    begin = 0.0
    agent = 0
    while len(lines) < requests:
        begin += random.exponential(1000.0 * steps / rate)
        agent += 1
        text = _Text(ids, heads[int(random.integers(kinds))])
        for step in range(int(random.geometric(1.0 / steps))):
            blocks = text.grow(_lognormal(random, result, 1.0, 8, 30_000))
            if text.tokens > 120_000:
                break
            answer = _lognormal(random, output, 0.9, 1, 2000)
            delay = None if step == 0 else float(random.lognormal(np.log(1500), 1.0))
            lines.append(Line(text.tokens, answer, blocks, begin if step == 0 else None, f"agent-{agent}", delay))
            text.grow(answer)
    return build(lines[:requests], name="agents")


KINDS: Mapping[str, Callable[..., Trace]] = {"prefixes": prefixes, "chats": chats, "agents": agents}
