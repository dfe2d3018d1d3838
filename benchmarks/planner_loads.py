"""Traffic for the planner: a day that is drawn by a seed, a recorded half hour, a day that is made of it, and minutes for real processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from dynamo_planner.contract import Floats

DAY = 86_400
DATA = Path(__file__).parent / "data"
RATES = DATA / "conversation_rate.txt"
"""Requests in each 10 s of the first half of the conversation trace that the Mooncake project published with its FAST'25 paper."""
REQUESTS = DATA / "conversation_requests.txt"
"""The same half hour: the lengths of every request, a line for each `PART` seconds."""
PART = 3


@attrs.frozen
class Day:
    """Arrivals of one day: how many in each second, and how long their prompts and answers are on average."""

    arrivals: Floats
    prompt: Floats
    output: Floats
    each: Sequence[Sequence[tuple[float, float]]] = ()
    """By second, the lengths of every single request; where it is empty, all of a second are as long as their mean."""

    def requests(self, second: int) -> Sequence[tuple[float, float]]:
        """Prompt and answer of each request of that second."""
        return self.each[second] if self.each else [(float(self.prompt[second]), float(self.output[second]))] * int(self.arrivals[second])

    def spread(self) -> float:
        """Variance of the prompt lengths over the square of their mean."""
        prompts = np.array([prompt for second in self.each for prompt, _ in second] or self.prompt)
        return float(prompts.var() / prompts.mean() ** 2)

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
    shape = _shape(at)
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


def recorded_day(seed: int, fastest: float = 5.0, scale: float = 1.0) -> Day:
    """The recorded half hour again and again, faster and slower over the day as `day` is busier and quieter. Its bursts and the lengths of its requests are real.

    :param seed: of where the recording begins, and of noise that lasts for minutes. :param fastest: how many times faster it runs at the busiest hour.
    """
    chance = np.random.default_rng(seed)
    length = int(DAY * scale)
    lines = [[(float(a), float(b)) for a, b in (pair.split(",") for pair in line.split())] for line in REQUESTS.read_text().splitlines() if not line.startswith("#")]
    due = [i * PART + (j + 0.5) / len(line) * PART for i, line in enumerate(lines) for j in range(len(line))]
    lengths = [pair for line in lines for pair in line]
    speed = fastest * _shape(np.arange(length) / length * 24) * np.exp(np.repeat(_wander(chance, length // 60 + 1, 0.95, 0.06), 60)[:length])
    reached = chance.integers(0, len(lines) * PART) + np.cumsum(speed)
    """Seconds of the recording that have passed, at the end of each second of the day."""
    rounds, within = np.divmod(reached, len(lines) * PART)
    until = (rounds * len(due) + np.searchsorted(due, within)).astype(int)
    since = np.concatenate([[until[0]], until[:-1]])
    each = [[lengths[i % len(lengths)] for i in range(start, end)] for start, end in zip(since, until, strict=True)]
    prompt, output = (_recent(np.array([sum(pair[part] for pair in second) for second in each], dtype=np.float64), until - since) for part in (0, 1))
    return Day((until - since).astype(np.float64), prompt, output, each)


RUSH = ((0, 3), (12, 3), (45, 14), (60, 14), (80, 5), (92, 5), (95, 15), (110, 15), (114, 5), (122, 3), (123, 0), (141, 0), (142, 2), (162, 3))
"""Seconds, and requests per second then; straight lines between."""
LEAD = 12
"""Seconds of it that come before the measurement: a planner that has just begun has no history to go by."""


@attrs.frozen
class Rush:
    """Single requests of some minutes."""

    requests: Sequence[tuple[float, int, int]]
    """When it is due, prompt tokens, and tokens to generate."""
    rates: Floats
    """That were drawn from, second by second."""
    lead: float
    prompt: float = 4000.0
    output: float = 60.0
    """Mean lengths."""


def rush(seed: int, scale: float = 1.0) -> Rush:
    """Poisson arrivals of a load that rises, falls, doubles at once, stops, and comes back from nothing.

    :param scale: all times but the lead in; the rates stay.
    """
    chance = np.random.default_rng(seed)
    length = LEAD + round((RUSH[-1][0] - LEAD) * scale)
    at = np.arange(length)
    rates = np.interp(np.where(at < LEAD, at, LEAD + (at - LEAD) / scale), *zip(*RUSH, strict=True))
    made = Rush((), rates, LEAD)
    requests: list[tuple[float, int, int]] = []
    for second, count in enumerate(chance.poisson(rates)):
        for part in np.sort(chance.random(count)):
            prompt = int(np.clip(made.prompt * np.exp(chance.normal(-0.25**2 / 2, 0.25)), 500, 10_000))
            requests.append((second + float(part), prompt, int(chance.integers(40, 81))))
    return attrs.evolve(made, requests=requests)


def recorded() -> Floats:
    return np.loadtxt(RATES)


def _shape(at: Floats) -> Floats:
    """Of the load over the hours of a day: a night and two humps."""
    return 0.08 + 0.75 * np.exp(-(((at - 11) / 2.2) ** 2)) + 0.9 * np.exp(-(((at - 17.5) / 2.8) ** 2))


def _recent(tokens: Floats, requests: NDArray[np.int64], seconds: int = 300) -> Floats:
    """The mean length of the requests of the last minutes, second by second."""
    total, count = np.cumsum(tokens), np.cumsum(requests)
    past = np.maximum(np.arange(tokens.size) - seconds, 0)
    return np.divide(total - total[past], count - count[past], out=np.full(tokens.size, total[-1] / count[-1]), where=count > count[past])


def _wander(chance: np.random.Generator, points: int, keep: float, step: float) -> Floats:
    found, value = np.empty(points), 0.0
    for i in range(points):
        value = keep * value + step * chance.standard_normal()
        found[i] = value
    return found
