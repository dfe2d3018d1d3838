"""The predictors meet their contract, and the kit finds those that do not; what the README shows works."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from dynamo_core.config import check
from dynamo_core.plugins import Plugins
from dynamo_planner.contract import Forecast
from dynamo_planner.decide import Stages
from dynamo_planner.predict.baselines import Constant, Ewma, SeasonalNaive
from dynamo_planner.predict.kalman import KalmanLevel, KalmanTrend
from dynamo_planner.predict.kit import PredictorContract
from dynamo_planner.stages.forecast import ForecastLoad
from dynamo_planner.stages.merge import Merge

ROOT = Path(__file__).parents[3]
README = (ROOT / "plugins/dynamo-planner/README.md").read_text()


class TestConstant(PredictorContract):
    @pytest.fixture
    def predictor(self):
        return Constant()


class TestEwma(PredictorContract):
    @pytest.fixture
    def predictor(self):
        return Ewma()


class TestSeasonalNaive(PredictorContract):
    @pytest.fixture(params=[12, 1440])
    def predictor(self, request):
        return SeasonalNaive(season=request.param)


class TestKalman(PredictorContract):
    @pytest.fixture(params=[KalmanLevel, KalmanTrend])
    def predictor(self, request):
        return request.param()


class _Faulty:
    min_points = 2
    seasonal = False

    def forecast(self, history, steps, level):
        return Constant().forecast(history, steps, level)


class Short(_Faulty):
    def forecast(self, history, steps, level):
        found = super().forecast(history, steps, level)
        return Forecast(found.mean[:1], found.low[:1], found.high[:1])


class Crossed(_Faulty):
    def forecast(self, history, steps, level):
        found = super().forecast(history, steps, level)
        return Forecast(found.mean, found.high + 1, found.low)


class Remembers(_Faulty):
    def __init__(self):
        self.calls = itertools.count()

    def forecast(self, history, steps, level):
        found = super().forecast(history, steps, level)
        return Forecast(found.mean + next(self.calls), found.low, found.high + 1e9)


class Writes(_Faulty):
    def forecast(self, history, steps, level):
        history[0] += 1
        return super().forecast(history, steps, level)


class Divides(_Faulty):
    def forecast(self, history, steps, level):
        scale = 1.0 / history.std() if history.std() else np.inf
        found = super().forecast(history, steps, level)
        return Forecast(found.mean, found.low - scale, found.high + scale)


class Shrinks(_Faulty):
    def forecast(self, history, steps, level):
        return super().forecast(history, steps, 1.2 - level)


class Grows(_Faulty):
    def forecast(self, history, steps, level):
        found = super().forecast(history, steps, level)
        return Forecast(found.mean + 1, found.low, found.high + 1)


@pytest.mark.parametrize(("fault", "test"), [(Short, "p1"), (Crossed, "p1"), (Remembers, "p2"), (Writes, "p2"), (Divides, "p3"), (Shrinks, "p4"), (Grows, "p5")])
def test_the_kit_finds_a_predictor_that_breaks_its_promise(fault, test):
    kit = PredictorContract()
    found = [name for name in dir(kit) if name.startswith(f"test_{test}")]
    assert len(found) == 1
    with pytest.raises(AssertionError):
        getattr(kit, found[0])(fault())


def test_the_stage_of_the_readme_holds_the_fleet(view, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)
    space: dict[str, type] = {}
    exec(code[1], space)
    stages = Stages(ForecastLoad(), [], Merge(), [space["Maintenance"]()])
    seen = view(wanted=())
    assert stages.decide(seen).constraints == []
    (tmp_path / "maintenance").touch()
    from dynamo_planner.contract import Proposal

    class Five:
        stage = "propose"

        def propose(self, view, outlook):
            return Proposal("five", "set", {"aggregated": 5})

    held = Stages(ForecastLoad(), [Five()], Merge(), [space["Maintenance"]()]).decide(seen)
    assert held.targets == {"aggregated": 2}
    assert held.won("aggregated").why == "maintenance exists"


def test_every_stack_of_the_readme_is_good():
    stacks = [block for block in re.findall(r"```toml\n(.*?)```", README, re.S) if 'use = "standard"' in block]
    assert stacks
    for text in stacks:
        assert check(text=text, environ={"CHAT_PLANNER_TOKEN": "x"}, plugins=Plugins.load()) == [], text


def test_every_setting_is_in_the_readme():
    import attrs

    from dynamo_planner.config import Metrics, Planner

    for cls in (Planner, Metrics):
        for field in attrs.fields(cls):
            if field.init:
                assert f"`{field.name}`" in README or f"[planner.{field.name}]" in README, field.name


def test_every_series_is_in_the_reference():
    from prometheus_client import CollectorRegistry

    from dynamo_planner.metrics import PlannerMetrics

    registry = CollectorRegistry()
    PlannerMetrics(registry)
    page = (ROOT / "docs/reference/metrics.md").read_text()
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in page
