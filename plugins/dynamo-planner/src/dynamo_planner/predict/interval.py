"""A forecast from its mean and its standard error."""

from __future__ import annotations

from statistics import NormalDist

from dynamo_planner.contract import Floats, Forecast


def around(mean: Floats, error: Floats, level: float) -> Forecast:
    """The interval that a normal error stays in with probability `level`."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    return Forecast(mean, mean - z * error, mean + z * error)
