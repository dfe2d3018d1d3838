"""What a replay says in the end: latencies, cache, throughput and spread of one stack, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from dynamo_sim.replay.engine import bucket_ms
from dynamo_sim.replay.simulate import Outcome
from dynamo_sim.replay.trace import Trace


@attrs.frozen
class Spread:
    """A latency in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Spread:
        if not len(values):
            return cls(*(float("nan"),) * 5)
        p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
        return cls(float(values.mean()), p50, p90, p99, float(values.max()))

    @classmethod
    def of_buckets(cls, tokens: Mapping[int, int], mean: float) -> Spread:
        """From counts in half-a-per-cent buckets, of which the mean is known exactly."""
        if not tokens:
            return cls(*(float("nan"),) * 5)
        slots = sorted(tokens)
        reached = np.cumsum([tokens[slot] for slot in slots])
        p50, p90, p99 = (bucket_ms(slots[int(np.searchsorted(reached, share * reached[-1]))]) for share in (0.5, 0.9, 0.99))
        return cls(mean, p50, p90, p99, bucket_ms(slots[-1]))


@attrs.frozen
class Report:
    """One stack on one trace. Equal for equal arguments of `simulate`."""

    stack: str
    requests: int
    refused: int
    """No worker could take them."""
    ttft_ms: Spread
    """From arrival to the first token."""
    itl_ms: Spread
    """From token to token, over all tokens."""
    e2e_ms: Spread
    hit_rate: float
    """Share of all prompt tokens that engines had in their caches."""
    predicted_hit_rate: float
    """The same as the router believed it when it chose."""
    output_tokens_per_s: float
    requests_per_s: float
    duration_s: float
    """From the first arrival to the last token, in virtual time."""
    busy_spread: float
    """Working time of the busiest worker over the mean of all."""
    requests_spread: float
    """Requests of the worker with most of them over the mean of all."""
    preempted: int
    faults: Mapping[str, int]
    """Policies and providers that were left out, and how often."""

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON: what there is nothing of, as the time between tokens of answers of one, is `None`."""
        return attrs.asdict(self, value_serializer=lambda _, __, value: None if isinstance(value, float) and not math.isfinite(value) else value)


def report(stack: str, trace: Trace, outcome: Outcome) -> Report:
    """What `outcome` comes to."""
    served = ~np.isnan(outcome.done)
    arrived, first, done = outcome.arrived[served], outcome.first[served], outcome.done[served]
    prompt, output = trace.prompt[served], trace.output[served]
    gaps = int((output - 1).sum())
    duration = float(done.max() - arrived.min()) / 1000.0 if len(done) else 0.0
    per_worker = np.bincount(outcome.worker[served], minlength=len(outcome.busy))
    tokens = max(1, int(prompt.sum()))
    return Report(
        stack, len(trace), int((~served).sum()), Spread.of(first - arrived),
        Spread.of_buckets(outcome.itl, float((done - first).sum()) / gaps if gaps else float("nan")), Spread.of(done - arrived),
        float(outcome.cached[served].sum()) / tokens, float(outcome.predicted[served].sum()) / tokens,
        float(output.sum()) / duration if duration else 0.0, len(done) / duration if duration else 0.0, duration,
        _over_mean(outcome.busy), _over_mean(per_worker), outcome.preempted, outcome.faults,
    )


def _over_mean(values: NDArray[Any]) -> float:
    mean = float(values.mean())
    return float(values.max()) / mean if mean else 1.0


_COLUMNS = ("stack", "TTFT mean", "p50", "p90", "p99", "ITL mean", "p99", "e2e mean", "p50", "p99", "hit %", "tok/s", "busy", "refused")


def table(reports: Sequence[Report], title: str) -> Table:
    """A line for each stack; below the first, the differences to it in per cent."""
    shown = Table(*_COLUMNS, title=title, title_justify="left", caption="milliseconds; busy: busiest worker over the mean", caption_justify="left")
    for column in shown.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    for r in reports:
        latencies = [r.ttft_ms.mean, r.ttft_ms.p50, r.ttft_ms.p90, r.ttft_ms.p99, r.itl_ms.mean, r.itl_ms.p99, r.e2e_ms.mean, r.e2e_ms.p50, r.e2e_ms.p99]
        cells = [f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in latencies]
        if r is not reports[0]:
            base = reports[0]
            for i, (mine, theirs) in enumerate(((r.ttft_ms.mean, base.ttft_ms.mean), (r.ttft_ms.p99, base.ttft_ms.p99), (r.e2e_ms.mean, base.e2e_ms.mean))):
                cells[(0, 3, 6)[i]] += f" {100 * (mine / theirs - 1):+.0f}%" if theirs > 0 else ""
        shown.add_row(r.stack, *cells, f"{100 * r.hit_rate:.1f}", f"{r.output_tokens_per_s:.0f}", f"{r.busy_spread:.2f}", str(r.refused))
    return shown
