"""Kalman filters of a level, and of a level with a trend. The noise is learned from the series, by maximum likelihood over a small grid.

A level that wanders and is seen through noise has one number that matters: the ratio of the two variances. The overall scale then
follows from the one-step errors. So a grid of ratios is enough, and all of them are filtered at once, as columns.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
from attrs import validators as v

from dynamo_planner.contract import Floats, Forecast
from dynamo_planner.predict.interval import around

_LEVEL_RATIOS = np.array([0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
_TREND_RATIOS = np.array([0.0, 1e-5, 1e-4, 1e-3, 1e-2])


@attrs.frozen
class KalmanLevel:
    """A level that wanders, seen through noise."""

    min_points: ClassVar[int] = 4
    seasonal: ClassVar[bool] = False
    window: int = attrs.field(default=240, validator=v.ge(8))
    """Intervals of the past that are looked at."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        q = _LEVEL_RATIOS
        series = history[-self.window :]
        state, variance = np.full(q.size, series[0]), np.full(q.size, 1.0)
        score, squares = np.zeros(q.size), np.zeros(q.size)
        for value in series[1:]:
            variance = variance + q
            total = variance + 1.0
            error = value - state
            gain = variance / total
            state = state + gain * error
            variance = variance * (1 - gain)
            score += np.log(total)
            squares += error**2 / total
        n = series.size - 1
        scale = np.maximum(squares / n, 1e-12)
        best = int(np.argmin(n * np.log(scale) + score))
        error = np.sqrt(scale[best] * (variance[best] + q[best] * np.arange(1, steps + 1) + 1.0))
        return around(np.full(steps, state[best]), error, level)


@attrs.frozen
class KalmanTrend:
    """A level with a slope, both of which wander, seen through noise. The slope fades, so that no trend goes on for ever."""

    min_points: ClassVar[int] = 6
    seasonal: ClassVar[bool] = False
    window: int = attrs.field(default=240, validator=v.ge(8))
    """Intervals of the past that are looked at."""
    fade: float = attrs.field(default=0.95, validator=[v.gt(0), v.le(1)])
    """What is left of the slope after an interval; 1: a trend goes on."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        q, t = (grid.ravel() for grid in np.meshgrid(_LEVEL_RATIOS, _TREND_RATIOS))
        series, f = history[-self.window :], self.fade
        a, b = np.full(q.size, series[0]), np.zeros(q.size)
        # The covariance of (level, slope): [[p, c], [c, s]].
        p, c, s = np.ones(q.size), np.zeros(q.size), t.copy()
        score, squares = np.zeros(q.size), np.zeros(q.size)
        for value in series[1:]:
            a, b = a + f * b, f * b
            p, c, s = p + 2 * f * c + f * f * s + q, f * c + f * f * s, f * f * s + t
            total = p + 1.0
            error = value - a
            k, m = p / total, c / total
            a, b = a + k * error, b + m * error
            p, c, s = p - k * p, c - k * c, s - m * c
            score += np.log(total)
            squares += error**2 / total
        n = series.size - 1
        scale = np.maximum(squares / n, 1e-12)
        best = int(np.argmin(n * np.log(scale) + score))
        return self._ahead(a[best], b[best], (p[best], c[best], s[best]), (q[best], t[best]), scale[best], steps, level)

    def _ahead(self, a: float, b: float, covariance: tuple[float, float, float], noise: tuple[float, float], scale: float,
               steps: int, level: float) -> Forecast:
        f, (p, c, s), (q, t) = self.fade, covariance, noise
        mean, variance = np.empty(steps), np.empty(steps)
        for i in range(steps):
            a, b = a + f * b, f * b
            p, c, s = p + 2 * f * c + f * f * s + q, f * c + f * f * s, f * f * s + t
            mean[i], variance[i] = a, p + 1.0
        return around(mean, np.sqrt(scale * variance), level)
