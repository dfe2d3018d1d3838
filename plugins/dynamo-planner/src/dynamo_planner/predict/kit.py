"""The conformance kit of predictors. Inherit it and give the fixture `predictor`; it needs pytest.

    P1  A forecast has a value for each step, and its interval is around its mean.
    P2  It is a function of the history: the same history gives the same forecast, and the history stays as it was.
    P3  Any history of at least `min_points` values will do: constant, all zero, with jumps.
    P4  A wider level gives an interval that is not narrower.
    P5  A load that stays is expected to stay.
"""

from __future__ import annotations

import numpy as np
import pytest

from dynamo_planner.contract import Floats, Predictor


def _histories(least: int) -> dict[str, Floats]:
    n = max(least, 40)
    chance = np.random.default_rng(7)
    return {
        "shortest": np.log1p(np.arange(1.0, least + 1)), "constant": np.full(n, 3.0), "zero": np.zeros(n), "jump": np.repeat([1.0, 5.0], n // 2),
        "noise": 4 + 0.3 * chance.standard_normal(n), "ramp": np.linspace(0.0, 6.0, n),
    }


class PredictorContract:
    """What `forecast` is called with are logarithms of counts or lengths, the newest last."""

    @pytest.fixture
    def predictor(self) -> Predictor:
        raise NotImplementedError("give the predictor under test")

    def test_p1_a_forecast_has_a_value_for_each_step_and_an_interval_around_it(self, predictor: Predictor) -> None:
        for steps in (1, 7):
            for name, history in _histories(predictor.min_points).items():
                found = predictor.forecast(history, steps, 0.8)
                assert found.mean.shape == found.low.shape == found.high.shape == (steps,), name
                assert bool((found.low <= found.mean + 1e-9).all()), name
                assert bool((found.mean <= found.high + 1e-9).all()), name

    def test_p2_the_same_history_gives_the_same_forecast(self, predictor: Predictor) -> None:
        histories = _histories(predictor.min_points)
        before = {name: history.copy() for name, history in histories.items()}
        first = {name: predictor.forecast(history, 3, 0.8).mean for name, history in histories.items()}
        for name, history in reversed(histories.items()):
            assert np.array_equal(predictor.forecast(history, 3, 0.8).mean, first[name]), f"{name}: it remembers what it was asked before"
            assert np.array_equal(history, before[name]), f"{name}: it wrote into the history"

    def test_p3_any_history_will_do(self, predictor: Predictor) -> None:
        for name, history in _histories(predictor.min_points).items():
            found = predictor.forecast(history, 3, 0.8)
            assert all(bool(np.isfinite(part).all()) for part in (found.mean, found.low, found.high)), name

    def test_p4_a_wider_level_gives_no_narrower_interval(self, predictor: Predictor) -> None:
        for name, history in _histories(predictor.min_points).items():
            narrow, wide = (predictor.forecast(history, 3, level) for level in (0.5, 0.95))
            assert bool((wide.high - wide.low >= narrow.high - narrow.low - 1e-9).all()), name

    def test_p5_a_load_that_stays_is_expected_to_stay(self, predictor: Predictor) -> None:
        found = predictor.forecast(np.full(max(60, predictor.min_points), 4.0), 5, 0.8)
        assert found.mean == pytest.approx(4.0, abs=0.05)
