"""Forecasts without a model of the series: the last value, the same time yesterday, a fading mean."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
from attrs import validators as v

from dynamo_planner.contract import Floats, Forecast
from dynamo_planner.predict.interval import around


@attrs.frozen
class Constant:
    """It stays as it is."""

    min_points: ClassVar[int] = 1
    seasonal: ClassVar[bool] = False

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        changes = np.diff(history)
        spread = float(np.sqrt(np.mean(changes**2))) if changes.size else 0.0
        return around(np.full(steps, history[-1]), spread * np.sqrt(np.arange(1, steps + 1)), level)


@attrs.frozen
class SeasonalNaive:
    """As it was one season ago, shifted by how the last hour differs from the same hour then."""

    min_points: ClassVar[int] = 2
    seasonal: ClassVar[bool] = True
    season: int = attrs.field(default=1440, validator=v.ge(2))
    """Intervals in a season: 1440 of a minute are a day."""
    recent: int = attrs.field(default=15, validator=v.ge(1))
    """Intervals by which the level of today is compared with that of a season ago."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        if history.size <= self.season:
            return Constant().forecast(history, steps, level)
        ahead = np.arange(steps) % self.season
        then = history[-self.season :][ahead]
        errors = history[self.season :] - history[: -self.season]
        recent = errors[-self.recent :]
        shift = float(np.mean(recent))
        return around(then + shift, np.full(steps, float(np.std(errors - shift)) if errors.size > 1 else 0.0), level)


@attrs.frozen
class Ewma:
    """The mean of the past, the recent past counting more."""

    min_points: ClassVar[int] = 2
    seasonal: ClassVar[bool] = False
    half_life: float = attrs.field(default=3.0, validator=v.gt(0))
    """Intervals after which a value counts half."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        keep = 0.5 ** (1.0 / self.half_life)
        mean, errors = float(history[0]), np.empty(history.size - 1)
        for i, value in enumerate(history[1:]):
            errors[i] = value - mean
            mean = keep * mean + (1 - keep) * float(value)
        spread = float(np.sqrt(np.mean(errors**2))) if errors.size else 0.0
        growth = np.sqrt(1 + np.arange(steps) * (1 - keep) ** 2)
        return around(np.full(steps, mean), spread * growth, level)
