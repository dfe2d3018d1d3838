"""What is known of the speed of a pool's workers: configured at first, then learned from the requests that went there.

    time to the first token    prefill_ms + prefill_ms_per_1000 x thousands of uncached tokens, its own and those before it on the worker
    time between tokens        itl_ms + itl_ms_per_sequence x other sequences on the worker

Two straight lines, each fitted by least squares of the *relative* error, so that long prompts do not outweigh short ones, in which what is old
counts less and less.
"""

from __future__ import annotations

import math

import attrs

from dynamo_global_router.contract import Estimate
from dynamo_global_router.settings import Rates

MEMORY = 100.0
"""Samples after which an old one counts for a third."""
BELIEF = 0.1
"""What the configured line counts for, in samples. It matters where none have come, or all alike."""
OUTLIER = 4.0
"""A sample counts at most as so many times what was expected, once there are `SETTLED` of them: a pause is not a speed."""
SETTLED = 10
FIRST = 3
"""Samples that are held against a guess more than against what was learned: they do not say how good estimates will be."""
LATELY = 20.0
"""Samples over which the usual error is averaged."""
_KEEP = math.exp(-1.0 / MEMORY)


Sums = tuple[float, float, float, float, float]
"""Weighted: of 1, x, x squared, y, and x times y."""


def _sums(x: float, y: float, weight: float) -> Sums:
    return weight, weight * x, weight * x * x, weight * y, weight * x * y


def _added(*parts: Sums) -> Sums:
    a, b, c, d, e = map(sum, zip(*parts, strict=True))
    return a, b, c, d, e


class Line:
    """y = base + slope * x, neither below zero."""

    def __init__(self, base: float, slope: float, span: float) -> None:
        """:param base: and :param slope: what is believed before any sample. :param span: an x that matters."""
        self.base, self.slope = base, slope
        self.samples = 0
        self.error = 0.0
        """By which share estimates were off lately, on average."""
        self._believed = ((0.0, base), (span, base + slope * span))
        self._seen: Sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._count = 0.0
        """Of the samples, old ones less."""

    def at(self, x: float) -> float:
        return self.base + self.slope * x

    def learn(self, x: float, y: float) -> None:
        """A sample: y was seen at x."""
        expected = self.at(x)
        if self.samples >= SETTLED:
            y = min(y, OUTLIER * expected)
        if (judged := self.samples + 1 - FIRST) > 0:
            self.error += (abs(y - expected) / max(expected, 0.1) - self.error) / min(LATELY, judged)
        self.samples += 1
        self._count = _KEEP * self._count + 1
        a, b, c, d, e = (_KEEP * seen for seen in self._seen)
        self._seen = _added((a, b, c, d, e), _sums(x, y, 1 / max(y, 0.1) ** 2))
        # What was believed counts for a part of an average sample, however far off it was.
        belief = BELIEF * self._seen[0] / self._count
        self._solve(*_added(self._seen, *(_sums(x, y, belief) for x, y in self._believed)))

    def _solve(self, n: float, sx: float, sxx: float, sy: float, sxy: float) -> None:
        spread = n * sxx - sx * sx
        slope = (n * sxy - sx * sy) / spread if spread > 0 else 0.0
        base = (sy - slope * sx) / n
        if slope < 0:
            slope, base = 0.0, sy / n
        elif base < 0:
            base, slope = 0.0, sxy / sxx
        self.base, self.slope = base, slope


@attrs.frozen
class Workload:
    """What a request meets at a worker."""

    tokens: int
    """Uncached prompt tokens until it has its first token: its own, and those before it."""
    sequences: float
    """Others in progress."""
    max_sequences: int = 0


class Speed:
    """The two lines of one pool, and how long its answers are."""

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self.ttft = Line(rates.prefill_ms, rates.prefill_ms_per_1000, 4.0)
        self.itl = Line(rates.itl_ms, rates.itl_ms_per_sequence, 32.0)
        self.output_tokens = 128.0
        """Of an answer, lately."""

    def estimate(self, load: Workload, expected_output_tokens: int | None, age_s: float) -> Estimate:
        """:param age_s: since a request was last sent there."""
        itl = self.itl.at(load.sequences)
        ttft = self.ttft.at(load.tokens / 1000)
        if load.max_sequences and (short := load.sequences + 1 - load.max_sequences) > 0:
            # It waits until others have ended; of those that run, one ends every (length of an answer / how many run).
            ttft += short * (expected_output_tokens or self.output_tokens) * itl / load.max_sequences
        samples = min(self.ttft.samples, self.itl.samples) or max(self.ttft.samples, self.itl.samples)
        return Estimate(ttft, itl, self.ttft.error, self.itl.error, samples, age_s if self._rates.learn else 0.0)

    def first_token(self, load: Workload, ms: float) -> None:
        """A request had its first token so long after it was sent. One that had to wait for others to end says nothing of the speed."""
        if self._rates.learn and not (load.max_sequences and load.sequences + 1 > load.max_sequences):
            self.ttft.learn(load.tokens / 1000, ms)

    def between_tokens(self, sequences: float, ms: float) -> None:
        """Tokens came so far apart, beside so many others on average."""
        if self._rates.learn:
            self.itl.learn(sequences, ms)

    def answered(self, tokens: int) -> None:
        self.output_tokens += (tokens - self.output_tokens) / MEMORY
