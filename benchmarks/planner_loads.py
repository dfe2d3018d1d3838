"""Days of traffic for the planner: one that is drawn by a seed, and a recorded half hour."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np

from dynamo_planner.contract import Floats

DAY = 86_400
RECORDED = Path(__file__).parent / "data/conversation_rate.txt"
"""Requests in each 10 s of the first half of the conversation trace that the Mooncake project published with its FAST'25 paper."""


@attrs.frozen
class Day:
    """Arrivals of one day: how many in each second, and how long their prompts and answers are on average."""

    arrivals: Floats
    prompt: Floats
    output: Floats

    def counts(self, seconds: int) -> Floats:
        """Arrivals in each stretch of so many seconds."""
        return self.arrivals.reshape(-1, seconds).sum(axis=1)


def day(seed: int, peak: float = 20.0, spikes: int = 4, scale: float = 1.0) -> Day:
    """A night and two humps, noise that lasts for minutes, spikes of a few minutes at any time, and an hour in which nobody asks.

    :param seed: of the noise and the spikes; the shape is the same every day. :param scale: shorter days, for trials: 0.1 has 8,640 seconds.
    """
    chance = np.random.default_rng(seed)
    length = int(DAY * scale)
    at = np.arange(length) / length * 24
    shape = 0.08 + 0.75 * np.exp(-(((at - 11) / 2.2) ** 2)) + 0.9 * np.exp(-(((at - 17.5) / 2.8) ** 2))
    noise = np.repeat(_wander(chance, length // 60 + 1, 0.95, 0.06), 60)[:length]
    rate = peak * shape * np.exp(noise)
    for _ in range(spikes):
        start = int(chance.integers(0, length - 1200))
        rise = np.minimum(1.0, np.arange(900) / 60) * (np.arange(900) < 600) + np.clip((900 - np.arange(900)) / 300, 0, 1) * (np.arange(900) >= 600)
        rate[start : start + 900] *= 1 + 1.2 * rise
    quiet = slice(int(length * 3.2 / 24), int(length * 4.2 / 24))
    rate[quiet] = 0.0
    prompt = 8000 * (1 + 0.15 * np.sin(at / 24 * 2 * np.pi)) * np.exp(np.repeat(_wander(chance, length // 60 + 1, 0.98, 0.01), 60)[:length])
    output = np.full(length, 600.0) * np.exp(np.repeat(_wander(chance, length // 60 + 1, 0.98, 0.01), 60)[:length])
    return Day(chance.poisson(rate).astype(np.float64), prompt, output)


def recorded() -> Floats:
    return np.loadtxt(RECORDED)


def _wander(chance: np.random.Generator, points: int, keep: float, step: float) -> Floats:
    found, value = np.empty(points), 0.0
    for i in range(points):
        value = keep * value + step * chance.standard_normal()
        found[i] = value
    return found
