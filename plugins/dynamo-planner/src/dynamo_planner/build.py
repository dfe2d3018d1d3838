"""From the `[planner]` table to the parts of a planner."""

from __future__ import annotations

from typing import Any

from dynamo_core.config import build
from dynamo_core.config.schema import Config, Use
from dynamo_core.errors import ConfigError, PluginError, Problem
from dynamo_core.plugins import Plugins
from dynamo_planner.config import Planner
from dynamo_planner.contract import ConstrainStage, Predictor, PredictStage, ProposeStage, ReconcileStage
from dynamo_planner.decide import Stages
from dynamo_planner.mind import Mind
from dynamo_planner.performance import profile


def settings(config: Config, plugins: Plugins) -> Planner:
    """The checked `[planner]` table. :raises ConfigError: there is none, or it is of another planner."""
    if config.planner is None:
        raise ConfigError(Problem("the configuration has no [planner] table", remedy='add [planner] with use = "standard" and [planner.metrics]'))
    found = build(config.planner, "planner", plugins)
    if not isinstance(found, Planner):
        raise ConfigError(Problem(f"`dynamo planner` runs the planner 'standard', and the configuration uses {config.planner.name!r}", config.planner.where))
    return found


def mind(table: Planner, plugins: Plugins) -> Mind:
    """What decides, as the table says. :raises ConfigError: a part cannot be built."""
    predictor: Any = build(table.predictor, "predictor", plugins)
    predictor = predictor() if isinstance(predictor, type) else predictor
    assert isinstance(predictor, Predictor)
    return Mind(table, stages(table, plugins), predictor, profile.load(table.profile) if table.profile is not None else None)


def stages(table: Planner, plugins: Plugins) -> Stages:
    """:raises ConfigError: a stage is used in a place that it is not made for."""
    return Stages(
        _stage(table.predict, PredictStage, "predict", plugins),
        [_stage(use, ProposeStage, "propose", plugins) for use in table.propose],
        _stage(table.reconcile, ReconcileStage, "reconcile", plugins),
        [_stage(use, ConstrainStage, "constrain", plugins) for use in table.constrain],
    )


def _stage(use: Use, kind: type[Any], name: str, plugins: Plugins) -> Any:
    found = build(use, "planner_stage", plugins)
    found = found() if isinstance(found, type) else found
    if not isinstance(found, kind):
        if (stage := getattr(found, "stage", None)) == name:
            raise PluginError(str(plugins.find("planner_stage", use.name).plugin), f"planner stage {use.name!r} has no method {name!r}")
        raise ConfigError(Problem(f"planner.{name} uses {use.name!r}, which is a stage of {stage or 'nothing'}", use.where))
    return found
