"""The load of the past in even steps, made of what each tick has seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dynamo_planner.contract import Load

RECENT = 30
"""Intervals that say how different prompts are; one alone has too few of them."""


class History:
    """Points of `interval` seconds. A stretch in which nothing could be seen is left out of the point that it falls in; a whole point without is not made."""

    def __init__(self, interval: float, keep: int) -> None:
        self._interval = interval
        self._points: deque[Load] = deque(maxlen=keep)
        self._shown: Sequence[Load] | None = None
        self._open: list[Load] = []
        self._since: float | None = None

    @property
    def points(self) -> Sequence[Load]:
        """The same object until a point is added."""
        if self._shown is None:
            self._shown = tuple(self._points)
        return self._shown

    def restore(self, point: Load) -> None:
        """Take in a whole point that was recorded before."""
        self._points.append(point)
        self._shown = None

    def add(self, load: Load) -> Load | None:
        """Take in one tick. Returns the point that it completes, if it completes one."""
        if self._since is None:
            self._since = load.at - load.seconds
        self._open.append(load)
        if load.at - self._since < self._interval - 1e-6:
            return None
        self._since = load.at
        point = merged(self._open)
        if not point.prompt_tokens and self._points:  # nothing ended in it: lengths are as they were
            last = self._points[-1]
            point = Load(point.at, point.seconds, point.rate, last.prompt_tokens, last.output_tokens, last.cached_share, point.in_progress, point.held,
                         prompt_spread=last.prompt_spread)
        self.restore(point)
        self._open.clear()
        return point


def merged(loads: Sequence[Load]) -> Load:
    """Several stretches as one. Means are weighted by requests."""
    seconds = sum(load.seconds for load in loads)
    arrived = [load.rate * load.seconds for load in loads]
    spoke = [(load, max(count, 1e-9)) for load, count in zip(loads, arrived, strict=True) if load.prompt_tokens]
    weight = sum(count for _, count in spoke)

    def mean(name: str) -> float:
        return sum(getattr(load, name) * count for load, count in spoke) / weight if weight else 0.0

    def timed(name: str) -> float | None:
        known = [(value, max(count, 1e-9)) for load, count in zip(loads, arrived, strict=True) if (value := getattr(load, name)) is not None]
        return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None

    prompt = mean("prompt_tokens")
    return Load(loads[-1].at, seconds, sum(arrived) / seconds, prompt, mean("output_tokens"), mean("cached_share"),
                sum(load.in_progress * load.seconds for load in loads) / seconds, loads[-1].held, timed("ttft"), timed("itl"), _spread(spoke, weight, prompt))


def _spread(spoke: Sequence[tuple[Load, float]], weight: float, mean: float) -> float:
    """Within the stretches, and between them."""
    squares = sum((1 + load.prompt_spread) * load.prompt_tokens**2 * count for load, count in spoke)
    return max(0.0, squares / weight / mean**2 - 1) if mean else 0.0
