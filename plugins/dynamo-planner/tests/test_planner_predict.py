"""What load to expect."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.plugins import Plugins
from dynamo_planner.predict.ahead import ahead, peak, without_idle_start, without_pauses
from dynamo_planner.predict.backtest import backtest
from dynamo_planner.predict.baselines import Constant, Ewma, SeasonalNaive
from dynamo_planner.predict.kalman import KalmanLevel, KalmanTrend

BUILT_IN = [Constant(), SeasonalNaive(season=24, recent=4), Ewma(), KalmanLevel(), KalmanTrend()]
NAMES = [type(p).__name__ for p in BUILT_IN]


@pytest.mark.parametrize("predictor", BUILT_IN, ids=NAMES)
@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=60), steps=st.integers(1, 5))
def test_a_forecast_is_never_negative_never_absurd_and_inside_its_interval(predictor, counts, steps):
    found = ahead(predictor, np.array(counts), steps, 0.8)
    assert found.mean.shape == found.low.shape == found.high.shape == (steps,)
    assert (found.low <= found.mean + 1e-6).all()
    assert (found.mean <= found.high + 1e-6).all()
    assert (found.low >= 0).all()
    assert (found.high <= 2 * max(counts) + 1e-6).all()


@pytest.mark.parametrize("predictor", BUILT_IN, ids=NAMES)
def test_a_constant_load_is_expected_to_stay(predictor):
    assert ahead(predictor, np.full(60, 50.0), 3, 0.8).mean == pytest.approx([50.0] * 3, rel=0.01)


def test_the_idle_time_before_the_first_request_is_skipped():
    assert without_idle_start(np.array([0, 0, 0, 3.0, 0, 5.0])).tolist() == [3.0, 0, 5.0]
    assert without_idle_start(np.zeros(4)).tolist() == [0.0]
    busy = np.array([20.0, 21.0, 19.0, 20.0, 22.0, 20.0, 21.0])
    assert ahead(KalmanLevel(), np.concatenate([np.zeros(200), busy]), 1, 0.8).mean == pytest.approx(ahead(KalmanLevel(), busy, 1, 0.8).mean)


def test_pauses_are_skipped_and_the_one_that_lasts_is_not():
    assert without_pauses(np.array([3.0, 0, 0, 5.0, 0, 0, 0, 4.0])).tolist() == [3.0, 0, 0, 5.0, 4.0]
    assert without_pauses(np.array([3.0, 0, 0, 0, 0])).tolist() == [3.0, 0, 0, 0, 0]
    assert without_pauses(np.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("predictor", [Constant(), Ewma(), KalmanLevel(), KalmanTrend()], ids=lambda predictor: type(predictor).__name__)
def test_a_load_that_comes_back_is_expected_to_be_what_it_was(predictor):
    chance = np.random.default_rng(3)
    before, back = chance.poisson(40, 60).astype(float), chance.poisson(40, 4).astype(float)
    through, paused = (ahead(predictor, np.concatenate([before, np.zeros(pause), back]), 2, 0.8) for pause in (0, 20))
    assert paused.high == pytest.approx(through.high)
    assert ahead(predictor, np.concatenate([before, np.zeros(20)]), 2, 0.8).mean[-1] < 0.5 * through.mean[-1], "while nobody asks, nobody is expected"


def test_whoever_looks_for_the_same_time_of_another_day_sees_pauses():
    day = np.array([8.0, 8.0, 0.0, 0.0, 0.0, 8.0, 8.0, 8.0])
    assert ahead(SeasonalNaive(season=8), np.concatenate([day, day[:2]]), 3, 0.8).mean.max() < 1.0


def test_a_trend_is_continued_and_fades():
    rising = np.exp(np.linspace(3.0, 5.0, 80))
    found = ahead(KalmanTrend(), rising, 40, 0.8).mean
    assert found[1] > 1.015 * rising[-1]
    assert found[39] - found[38] < 0.3 * (found[1] - found[0])
    assert ahead(KalmanLevel(), rising, 40, 0.8).mean[-1] == pytest.approx(rising[-1], rel=0.05)


def test_a_season_is_repeated_at_todays_level():
    shape = 10 + 5 * np.sin(np.arange(24) / 24 * 2 * np.pi)
    found = SeasonalNaive(season=24, recent=6).forecast(np.concatenate([shape, shape[:12] + 2.0]), 3, 0.8)
    assert found.mean == pytest.approx(shape[12:15] + 2.0)


def test_a_noisy_level_is_told_from_one_that_wanders():
    chance = np.random.default_rng(1)
    noise = 100 + 10 * chance.standard_normal(200)
    walk = 100 + np.cumsum(10 * chance.standard_normal(200))
    assert abs(KalmanLevel().forecast(noise, 1, 0.8).mean[0] - 100) < 5
    assert KalmanLevel().forecast(walk, 1, 0.8).mean[0] == pytest.approx(walk[-1], abs=4)


def test_the_interval_holds_about_as_often_as_it_says():
    chance = np.random.default_rng(2)
    counts = np.exp(4 + np.cumsum(0.02 * chance.standard_normal(400)) + 0.1 * chance.standard_normal(400))
    (score,) = backtest({"kalman": KalmanLevel()}, counts, steps=1, skip=100)
    assert 0.7 < score.covered < 0.9


def test_a_backtest_ranks_the_one_that_fits_the_series_first():
    chance = np.random.default_rng(3)
    season = 100 * (1 + 0.8 * np.sin(np.arange(48 * 6) / 48 * 2 * np.pi)) * np.exp(0.02 * chance.standard_normal(48 * 6))
    scores = backtest({"constant": Constant(), "season": SeasonalNaive(season=48, recent=6)}, season, steps=6, skip=60)
    assert [score.name for score in scores] == ["season", "constant"]
    with pytest.raises(ValueError, match="too few"):
        backtest({"constant": Constant()}, season[:20], steps=2)


def test_the_peak_is_the_highest_of_the_steps_and_scaled():
    found = ahead(KalmanTrend(), np.exp(np.linspace(0, 3, 40)), 5, 0.8)
    assert peak(found, scale=10.0).mean == pytest.approx(found.mean.max() / 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arima", "ets"])
def test_the_predictors_of_statsmodels_follow_a_trend(name):
    pytest.importorskip("statsmodels")
    predictor = Plugins.load().find("predictor", name).load()()
    rising = np.exp(np.linspace(3.0, 4.0, 60) + 0.01 * np.random.default_rng(4).standard_normal(60))
    found = ahead(predictor, rising, 2, 0.8)
    assert rising[-1] * 0.98 < found.mean[1] < rising[-1] * 1.2
    assert found.low[1] < found.mean[1] < found.high[1]


def test_every_predictor_that_is_registered_keeps_the_protocol():
    for name, component in Plugins.load().of_kind("predictor").items():
        if component.plugin.distribution == "dynamo-planner" and name not in ("arima", "ets"):
            assert ahead(component.load()(), np.arange(1.0, 40.0), 2, 0.8).mean.shape == (2,)
