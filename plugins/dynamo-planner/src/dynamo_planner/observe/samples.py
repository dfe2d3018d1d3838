"""Samples of counters that only grow, and what they grew by between two looks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import attrs

NAMES = (
    "dynamo_frontend_requests_started_total",
    "dynamo_frontend_input_sequence_tokens_sum",
    "dynamo_frontend_input_sequence_tokens_count",
    "dynamo_frontend_input_sequence_tokens_bucket",
    "dynamo_frontend_output_sequence_tokens_sum",
    "dynamo_frontend_output_sequence_tokens_count",
    "dynamo_frontend_cached_tokens_sum",
    "dynamo_frontend_time_to_first_token_seconds_sum",
    "dynamo_frontend_time_to_first_token_seconds_count",
    "dynamo_frontend_inter_token_latency_seconds_sum",
    "dynamo_frontend_inter_token_latency_seconds_count",
    "dynamo_frontend_inflight_requests",
    "dynamo_frontend_held_requests",
    "dynamo_frontend_disconnected_clients_total",
    "process_start_time_seconds",
)
"""The series that are looked at. `PRESENCE` has no labels, so that every frontend exports it from its first moment."""
BUCKET = "{name}/{le:g}"
"""How the growth of one bucket of a histogram is named."""
PRESENCE = "dynamo_frontend_disconnected_clients_total"
START = "process_start_time_seconds"
GAUGES = ("dynamo_frontend_inflight_requests", "dynamo_frontend_held_requests")


@attrs.frozen
class Sample:
    name: str
    labels: tuple[tuple[str, str], ...]
    """Sorted, without the name."""
    value: float

    def label(self, name: str) -> str | None:
        return dict(self.labels).get(name)


class SeveralProcesses(Exception):
    """Different processes answer in turn; what one counts says nothing of the others."""


_STARTING = 10.0
"""Seconds from a process's start until its numbers can be read."""


@attrs.define
class Growth:
    """Follows one frontend process. A restarted process counts from zero."""

    unseen: float | None = None
    """Unix time at which others were looked at, and this one was not there yet."""
    _last: dict[tuple[str, tuple[tuple[str, str], ...]], float] | None = attrs.field(init=False, default=None)
    _started: float = attrs.field(init=False, default=0.0)
    _looked: float = attrs.field(init=False, default=0.0)

    def since_last(self, samples: Iterable[Sample], wall: float) -> Mapping[str, float]:
        """What each counter grew by, summed over labels; gauges as they are, and nothing else at the first look at a process that may be older than the
        look before: how old its counts are is unknown.

        :param wall: Unix time. :raises SeveralProcesses: a process answers that is not the one of before, and did not start since.
        """
        now = {(sample.name, sample.labels): sample.value for sample in samples}
        started = next((value for (name, _), value in now.items() if name == START), 0.0)
        before, looked = self._last, self._looked
        other = before is not None and abs(started - self._started) > 1.0
        if other and started < looked - 1.0:
            raise SeveralProcesses
        if before is None and self.unseen is not None and started > self.unseen - _STARTING:
            before = {}
        self._last, self._started, self._looked = now, started, wall
        grown: dict[str, float] = {}
        for (name, labels), value in now.items():
            if name in GAUGES:
                grown[name] = grown.get(name, 0.0) + value
            elif before is not None:
                step = value - (0.0 if other else before.get((name, labels), 0.0))
                key = BUCKET.format(name=name, le=float(dict(labels)["le"])) if name.endswith("_bucket") else name
                grown[key] = grown.get(key, 0.0) + (step if step >= 0 else value)
        return grown


def spread(grown: Mapping[str, float], histogram: str) -> float:
    """Variance over the square of the mean, of what was added to a histogram; values are taken to be spread evenly over their bucket."""
    start = f"{histogram}_bucket/"
    buckets = sorted((float(key.removeprefix(start)), count) for key, count in grown.items() if key.startswith(start))
    low = below = first = second = 0.0
    for high, count in buckets:
        high = high if math.isfinite(high) else 2 * low
        first += (count - below) * (low + high) / 2
        second += (count - below) * (low * low + low * high + high * high) / 3
        low, below = high, count
    return max(0.0, second * below / first**2 - 1) if first > 0 else 0.0
