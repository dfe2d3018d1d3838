"""Predictors on recorded load: what each would have said at every point of the past, and how wrong it would have been."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from dynamo_planner.contract import Floats, Predictor
from dynamo_planner.predict.ahead import ahead


@attrs.frozen
class Score:
    """Of one predictor on one series. Errors are of the value `steps` ahead."""

    name: str
    error: float
    """Mean absolute error, as a share of the mean value."""
    under: float
    """Mean amount by which it was too low, as a share of the mean value: requests that nobody was there for."""
    covered: float
    """Share of the values that fell into the interval."""
    milliseconds: float
    """Of one forecast."""


def backtest(predictors: Mapping[str, Predictor], series: Floats, *, steps: int, level: float = 0.8, every: int = 1, skip: int = 60) -> Sequence[Score]:
    """Forecast at every `every`-th point after the first `skip`, from what was known there. The best first, by error.

    :raises ValueError: the series is too short.
    """
    points = range(skip, series.size - steps, every)
    if not points:
        raise ValueError(f"{series.size} points are too few to look {steps} ahead after the first {skip}")
    scores = [_score(name, predictor, series, points, steps, level) for name, predictor in predictors.items()]
    return sorted(scores, key=lambda score: score.error)


def _score(name: str, predictor: Predictor, series: Floats, points: range, steps: int, level: float) -> Score:
    began = time.perf_counter()
    said = [ahead(predictor, series[: at + 1], steps, level) for at in points]
    seconds = time.perf_counter() - began
    truth = series[[at + steps for at in points]]
    mean, low, high = (np.array([getattr(forecast, part)[-1] for forecast in said]) for part in ("mean", "low", "high"))
    scale = max(float(series.mean()), 1e-9)
    inside = (truth >= low - 1e-9) & (truth <= high + 1e-9)
    return Score(name, float(np.abs(mean - truth).mean()) / scale, float(np.maximum(truth - mean, 0).mean()) / scale, float(inside.mean()),
                 seconds / len(said) * 1000)
