"""Predict: the load at the time when a replica that is started now would serve."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import attrs
import numpy as np
from attrs import validators as v

from dynamo_planner.contract import Expected, Outlook, View
from dynamo_planner.predict.ahead import ahead, peak


@attrs.frozen
class ForecastLoad:
    """Forecasts arrivals and lengths with the configured predictor, and takes the peak until a replica could serve and one interval on."""

    stage: ClassVar[Literal["predict"]] = "predict"
    level: float = attrs.field(default=0.8, validator=[v.gt(0), v.lt(1)])
    """Probability that the load stays within the interval."""

    def predict(self, view: View) -> Outlook | None:
        if not view.history:
            return None
        steps = max(1, math.ceil(view.cold_start / view.interval) + 1)
        arrivals = np.array([load.rate * load.seconds for load in view.history])
        busy = [load for load in view.history if load.rate > 0 and load.prompt_tokens > 0]
        lengths = [[load.prompt_tokens for load in busy] or [0.0], [load.output_tokens for load in busy] or [0.0]]
        prompt, output = (peak(ahead(view.predictor, np.array(series), steps, self.level)) for series in lengths)
        rate = peak(ahead(view.predictor, arrivals, steps, self.level), scale=view.history[-1].seconds)
        return Outlook(_ordered(rate), _ordered(prompt), _ordered(output), type(view.predictor).__name__, steps * view.interval)


def _ordered(expected: Expected) -> Expected:
    """Cutting at zero or at the limit may leave the mean outside of its own interval."""
    return Expected(expected.mean, min(expected.low, expected.mean), max(expected.high, expected.mean))
