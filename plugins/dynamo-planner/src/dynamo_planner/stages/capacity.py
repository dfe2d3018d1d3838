"""How many replicas meet a latency target: queueing for prompts, occupancy for decoding.

Prompts are read one after the other, by whichever replica is free: an M/M/n queue, whose waiting time has a closed form (Erlang's C). Prompts of
very different lengths make for longer waits than that, in proportion to the scatter of the work, and for more work: a long one costs more than its tokens say.
Sequences decode together, and the more there are, the slower each: Little's law gives their mean number, and the number at a moment
scatters around it by its root. Both are asked for a share of the requests that must meet the target, not for a mean.
Everything here grows with the load and never falls: more load never needs fewer replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import NormalDist

import attrs

from dynamo_planner.contract import Performance

MOST = 4096
"""More replicas than this are never asked for."""
NEGLIGIBLE = 0.05
"""A spread of prompt lengths that a histogram of a few buckets could not tell from none."""
EXAMPLES = 48
"""Lengths that stand for all."""
_NORMAL = NormalDist()


@attrs.frozen
class Demand:
    """What has to be served."""

    rate: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float = 0.0
    prompt_spread: float = 0.0
    """Variance of the prompt lengths over the square of their mean."""

    @property
    def uncached(self) -> float:
        return self.prompt_tokens * (1 - min(0.95, max(0.0, self.cached_share)))

    @property
    def context(self) -> float:
        """The mean length of a sequence while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2


@attrs.frozen
class Need:
    replicas: int
    why: str


@attrs.frozen
class Work:
    """Seconds that a replica spends on one prompt: several examples, each as likely as the others."""

    examples: Sequence[float]

    @property
    def mean(self) -> float:
        return sum(self.examples) / len(self.examples)

    @property
    def scatter(self) -> float:
        """Variance over the square of the mean, at least that of the queue with a closed form."""
        return max(1.0, sum(part * part for part in self.examples) / len(self.examples) / self.mean**2 - 1) if self.mean else 1.0


def reading(demand: Demand, performance: Performance, more: float = 0.0) -> Work:
    """Prompts as they are spread, log-normally. :param more: seconds that each takes besides."""
    if demand.prompt_spread < NEGLIGIBLE:
        return Work((performance.prefill(demand.uncached) + more,))
    sigma = math.sqrt(math.log1p(demand.prompt_spread))
    # The mean of each of so many parts of the distribution, so that the mean of all is right, and most of its tail is there.
    ends = [0.0, *(_NORMAL.cdf(_NORMAL.inv_cdf(i / EXAMPLES) - sigma) for i in range(1, EXAMPLES)), 1.0]
    return Work([performance.prefill(demand.uncached * EXAMPLES * (high - low)) + more for low, high in pairwise(ends)])


def waiting(servers: int, offered: float) -> float:
    """Erlang's C: the probability that an arrival waits. :param offered: arrivals per second times seconds of work each."""
    if offered <= 0:
        return 0.0
    if offered >= servers:
        return 1.0
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def late(servers: int, rate: float, work: Work, target: float) -> float:
    """The probability that waiting and work together take longer than `target`. Where work alone does, that there is waiting at all."""
    mean = work.mean
    offered = rate * mean
    if offered >= servers:
        return 1.0
    if mean <= 0:
        return 0.0
    pace = (servers - offered) / mean * 2 / (1 + work.scatter)
    return waiting(servers, offered) * sum(math.exp(-pace * max(0.0, target - part)) for part in work.examples) / len(work.examples)


def most_concurrency(performance: Performance, context: float, itl: float) -> float:
    """The most sequences that one replica decodes within the target, at least one."""
    most = performance.most_sequences(context)
    if performance.itl(context, most) <= itl:
        return most
    low, high = 1.0, most
    while high - low > 1e-6 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if performance.itl(context, middle) <= itl else (low, middle)
    return low


def occupancy(most: float, share: float) -> float:
    """The mean number of sequences that stays at or below `most` for this share of the time."""
    z = max(0.0, _NORMAL.inv_cdf(share))
    root = (-z + math.sqrt(z * z + 4 * most)) / 2
    return max(root * root, 0.5)


def prefill(demand: Demand, performance: Performance, ttft: float, share: float) -> Need:
    """Replicas that read prompts and do nothing else."""
    work = reading(demand, performance)
    replicas = _least(lambda n: late(n, demand.rate, work, ttft) <= 1 - share) if demand.rate > 0 else 0
    note = f", and one alone takes longer than the target of {_ms(ttft)}" if work.mean > ttft else ""
    why = f"{demand.rate:.3g} prompts/s of {demand.uncached:.0f} uncached tokens, {_ms(work.mean)} each{note}: {replicas} keep {share:.0%} within it"
    return Need(replicas, why if demand.rate > 0 else "no prompts are expected")


def decode(demand: Demand, performance: Performance, itl: float, share: float) -> Need:
    """Replicas that decode and do nothing else."""
    most = most_concurrency(performance, demand.context, itl)
    sequences = demand.rate * demand.output_tokens * performance.itl(demand.context, most)
    replicas = min(MOST, math.ceil(sequences / occupancy(most, share) - 1e-9))
    note = f", where even one sequence takes longer than {_ms(itl)}" if performance.itl(demand.context, 1.0) > itl else ""
    return Need(replicas, f"{sequences:.3g} sequences of {demand.context:.0f} tokens at once, and one replica decodes {most:.3g} within {_ms(itl)}{note}"
                if demand.rate > 0 else "nothing to decode is expected")


def aggregated(demand: Demand, performance: Performance, ttft: float, itl: float, share: float) -> Need:
    """Replicas that do both: reading prompts takes its share of every second, and decoding gets the rest."""
    work = reading(demand, performance, performance.itl(demand.context, 1.0))
    most = most_concurrency(performance, demand.context, itl)

    def enough(n: int) -> bool:
        busy = demand.rate * work.mean / n
        if busy >= 0.95 or late(n, demand.rate, work, ttft) > 1 - share:
            return False
        slowed = most_concurrency(performance, demand.context, itl * (1 - busy))
        between = min(itl, performance.itl(demand.context, most) / (1 - busy))
        return demand.rate * demand.output_tokens * between / n <= occupancy(slowed, share)

    replicas = _least(enough) if demand.rate > 0 else 0
    why = f"{demand.rate:.3g} requests/s, {_ms(work.mean)} to read each, {most:.3g} decode together within {_ms(itl)}"
    return Need(replicas, why if demand.rate > 0 else "no requests are expected")


def _least(enough: Callable[[int], bool]) -> int:
    """The smallest number that is enough, as every greater one is."""
    high = 1
    while high < MOST and not enough(high):
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 10 else f"{seconds:.3g} s"
