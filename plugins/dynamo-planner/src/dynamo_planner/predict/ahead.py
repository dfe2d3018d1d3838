"""How a predictor is asked: in log space, without the idle time before the first request and without pauses, never below zero."""

from __future__ import annotations

import numpy as np

from dynamo_planner.contract import Expected, Floats, Forecast, Predictor
from dynamo_planner.predict.baselines import Constant

PAUSE = 3
"""Points in a row without a request that are a pause, and not a part of the load's noise."""


def without_idle_start(history: Floats) -> Floats:
    """The series from its first value above zero on."""
    busy = np.flatnonzero(history > 0)
    return history[busy[0] :] if busy.size else history[-1:]


def without_pauses(history: Floats) -> Floats:
    """The series without its zeros where several of them come one after the other; those at its end stay.

    A load that has come back is like the one before the pause. The way to nothing and back, in logarithms, would pass for what the load does by itself,
    and make every interval wide for hours.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], history == 0, [False]]).astype(np.int8)))
    keep = np.ones(history.size, dtype=bool)
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        keep[start:end] = end - start < PAUSE or end == history.size
    return history[keep]


def ahead(predictor: Predictor, history: Floats, steps: int, level: float) -> Forecast:
    """Forecast a series of counts or lengths.

    Logarithms (of 1 + x) make growth by a share out of growth by an amount, and noise of a busy hour comparable with that of a quiet one.
    A forecast beyond twice the greatest value ever seen is cut there: an extrapolated trend is no reason to buy a fleet.
    """
    series = without_idle_start(np.asarray(history, dtype=np.float64))
    if not predictor.seasonal:
        series = without_pauses(series)
    chosen: Predictor = predictor if series.size >= predictor.min_points else Constant()
    found = chosen.forecast(np.log1p(np.maximum(series, 0.0)), steps, level)
    most = np.log1p(2.0 * max(float(series.max(initial=0.0)), 0.0))
    back = [np.maximum(np.expm1(np.minimum(np.nan_to_num(part, nan=0.0), most)), 0.0) for part in (found.mean, found.low, found.high)]
    return Forecast(*back)


def peak(forecast: Forecast, scale: float = 1.0) -> Expected:
    """The step at which the mean is highest. :param scale: what the values are divided by."""
    at = int(np.argmax(forecast.mean))
    return Expected(*(float(part[at]) / scale for part in (forecast.mean, forecast.low, forecast.high)))
