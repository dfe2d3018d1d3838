"""ARIMA and exponential smoothing of statsmodels: `pip install dynamo-planner[statsmodels]`."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import attrs
import numpy as np
from attrs import validators as v

from dynamo_planner.contract import Floats, Forecast


@attrs.frozen
class Arima:
    """Autoregression on differences, with a moving average of the errors."""

    min_points: ClassVar[int] = 24
    order: tuple[int, int, int] = (2, 1, 1)
    """Autoregressive terms, differences, moving-average terms."""
    window: int = attrs.field(default=240, validator=v.ge(24))
    """Intervals of the past that are looked at."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        from statsmodels.tsa.arima.model import ARIMA

        model: Any = ARIMA(history[-self.window :], order=self.order, enforce_stationarity=False, enforce_invertibility=False)
        with warnings.catch_warnings():  # a fit that stopped early still forecasts, and its interval says how well
            warnings.simplefilter("ignore")
            return _ahead(model.fit(method_kwargs={"maxiter": 50}), steps, level)


@attrs.frozen
class Ets:
    """Exponential smoothing with additive errors and a damped trend."""

    min_points: ClassVar[int] = 24
    window: int = attrs.field(default=240, validator=v.ge(24))
    """Intervals of the past that are looked at."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        from statsmodels.tsa.statespace.exponential_smoothing import ExponentialSmoothing

        model: Any = ExponentialSmoothing(history[-self.window :], trend=True, damped_trend=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _ahead(model.fit(disp=False, maxiter=50), steps, level)


def _ahead(fitted: Any, steps: int, level: float) -> Forecast:
    ahead: Any = fitted.get_forecast(steps)
    interval = np.asarray(ahead.conf_int(alpha=1 - level), dtype=np.float64)
    return Forecast(np.asarray(ahead.predicted_mean, dtype=np.float64), interval[:, 0], interval[:, 1])
