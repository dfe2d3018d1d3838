"""What the frontend may cost: each budget, the figure it is held against, and whether that is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import attrs

Runs = Mapping[str, list[dict[str, Any]]]
"""Scenario to the phases measured, one for each repeat."""


def per_request(phase: Mapping[str, Any]) -> float:
    return phase["us_per_request"]["frontend"]


def per_token(phase: Mapping[str, Any]) -> float:
    return phase["us_per_token"]["frontend"]


def first_token(phase: Mapping[str, Any]) -> float:
    return phase["ttft_ms"]["p50"]


def peak(phase: Mapping[str, Any]) -> float:
    return phase["memory"]["frontend"]["peak_mb"]


def errors(phase: Mapping[str, Any]) -> float:
    return phase["errors"]


def of(runs: Runs, scenario: str, figure: Callable[[Mapping[str, Any]], float]) -> float | None:
    """The median over the repeats, of those with answers."""
    values = [figure(phase) for phase in runs.get(scenario, ()) if phase.get("done")]
    return median(values) if values else None


def ratio(ours: Runs, theirs: Runs, scenario: str, figure: Callable[[Mapping[str, Any]], float]) -> float | None:
    """The median over the repeats of ours to theirs, which were measured one right after the other; `None` unless every repeat has both."""
    pairs = list(zip(ours.get(scenario, ()), theirs.get(scenario, ()), strict=False))
    if not pairs or len(ours[scenario]) != len(theirs[scenario]) or not all(phase.get("done") for pair in pairs for phase in pair):
        return None
    return median(figure(mine) / figure(other) for mine, other in pairs)


@attrs.frozen
class Ratio:
    """Against the peer in the same run."""

    title: str
    scenario: str
    figure: Callable[[Mapping[str, Any]], float]
    unit: str
    limits: Mapping[str, float]
    """By target."""


@attrs.frozen
class Limit:
    """In absolute terms."""

    title: str
    scenario: str
    figure: Callable[[Mapping[str, Any]], float]
    unit: str
    limit: float


RATIOS = (
    Ratio("paced chat, CPU per token", "paced", per_token, "us", {"hypercorn": 0.55, "uvicorn": 0.3}),
    Ratio("chat flat out, CPU per request", "chat", per_request, "us", {"hypercorn": 0.8, "uvicorn": 0.5}),
    Ratio("short, CPU per request", "short", per_request, "us", {"hypercorn": 0.8, "uvicorn": 0.45}),
    Ratio("long, CPU per request", "long", per_request, "us", {"hypercorn": 0.6, "uvicorn": 0.6}),
    Ratio("added time to first token, one at a time", "single", first_token, "ms", {"hypercorn": 1.0, "uvicorn": 1.0}),
)
LIMITS = (
    Limit("overload, errors", "overload", errors, "", 0),
    Limit("overload, peak resident memory", "overload", peak, "MB", 250),
)
IDLE_MB, IDLE_PERCENT = 120.0, 1.0
HELP_MS = 150.0
STALL_MS = 10.0
