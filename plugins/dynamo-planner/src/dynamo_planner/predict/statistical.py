"""ARIMA and exponential smoothing of statsmodels: `pip install dynamo-planner[statsmodels]`."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import attrs
import numpy as np
from attrs import validators as v

from dynamo_planner.contract import Floats, Forecast
from dynamo_planner.predict.interval import around


@attrs.frozen
class Arima:
    """Autoregression on differences, with a moving average of the errors."""

    min_points: ClassVar[int] = 24
    seasonal: ClassVar[bool] = False
    order: tuple[int, int, int] = (2, 1, 1)
    """Autoregressive terms, differences, moving-average terms."""
    window: int = attrs.field(default=240, validator=v.ge(24))
    """Intervals of the past that are looked at."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        from statsmodels.tsa.arima.model import ARIMA

        model: Any = ARIMA(history[-self.window :], order=self.order, enforce_stationarity=False, enforce_invertibility=False)
        with warnings.catch_warnings():  # a fit that stopped early still forecasts, and its interval says how well
            warnings.simplefilter("ignore")
            start = _near(model)
            iterations = 50 if start is None else 10
            ahead: Any = model.fit(start_params=start, method_kwargs={"maxiter": iterations}, cov_type="none").get_forecast(steps)
        interval = np.asarray(ahead.conf_int(alpha=1 - level), dtype=np.float64)
        return Forecast(np.asarray(ahead.predicted_mean, dtype=np.float64), interval[:, 0], interval[:, 1])


def _near(model: Any) -> Any:
    """Parameters that a few iterations lead to the best from, by the estimate of Hannan and Rissanen, or `None`: it is cheap, and at times useless."""
    try:
        found: Any = model.fit(method="hannan_rissanen")
    except (ValueError, np.linalg.LinAlgError):
        return None
    roots = np.abs(np.concatenate([found.arroots, found.maroots]))
    return found.params if np.all(roots > 1.001) else None


@attrs.frozen
class Ets:
    """Exponential smoothing with additive errors and a damped trend."""

    min_points: ClassVar[int] = 24
    seasonal: ClassVar[bool] = False
    window: int = attrs.field(default=240, validator=v.ge(24))
    """Intervals of the past that are looked at."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        from statsmodels.tsa.exponential_smoothing.ets import ETSModel

        # Where the level begins, is estimated from the first points and not fitted: the forecasts are the same, at a tenth of the time.
        model: Any = ETSModel(history[-self.window :], error="add", trend="add", damped_trend=True, initialization_method="heuristic")
        with warnings.catch_warnings():  # a fit that stopped early still forecasts, and its interval says how well
            warnings.simplefilter("ignore")
            fitted: Any = model.fit(disp=False, maxiter=50)
        alpha, beta, damping = (float(value) for value in fitted.params[:3])
        passed_on = alpha + beta * np.cumsum(damping ** np.arange(1, steps))  # of an error, so many steps later
        error = np.sqrt(float(fitted.scale) * np.concatenate([[1.0], 1.0 + np.cumsum(passed_on**2)]))
        return around(np.asarray(fitted.forecast(steps), dtype=np.float64), error, level)
