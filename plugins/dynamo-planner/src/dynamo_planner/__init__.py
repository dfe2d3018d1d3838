"""How many workers a fleet needs: what is seen, what is expected, what is decided and why."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.add("planner", "standard", "dynamo_planner.config:Planner", summary="predict, propose, reconcile, constrain; every stage by name")
    registry.add("planner", "global", "dynamo_planner.sharing.server:GlobalPlanner", summary="one GPU budget over several planners")
    registry.add("connector", "local", "dynamo_planner.connectors.local:LocalConnector", summary="workers as processes of this machine")
    registry.add("connector", "virtual", "dynamo_planner.connectors.virtual:VirtualConnector", summary="decisions in the discovery store, for somebody else")
    registry.add("connector", "global", "dynamo_planner.connectors.shared:SharedConnector", summary="any other one, within a budget that planners share")
    for name, target, summary in (
        ("constant", "baselines:Constant", "it stays as it is"),
        ("seasonal-naive", "baselines:SeasonalNaive", "as it was a day ago"),
        ("ewma", "baselines:Ewma", "the mean of the past, the recent past counting more"),
        ("kalman", "kalman:KalmanLevel", "a level that wanders"),
        ("kalman-trend", "kalman:KalmanTrend", "a level with a slope that fades"),
        ("arima", "statistical:Arima", "ARIMA; pip install dynamo-planner[statsmodels]"),
        ("ets", "statistical:Ets", "exponential smoothing; pip install dynamo-planner[statsmodels]"),
    ):
        registry.add("predictor", name, f"dynamo_planner.predict.{target}", summary=summary)
    for name, target, summary in (
        ("forecast", "forecast:ForecastLoad", "predict: the peak until a new replica would serve"),
        ("sla", "sla:Sla", "propose: what the expected load needs to meet the latency targets"),
        ("load", "load:ByLoad", "propose: what the engines say of themselves now"),
        ("merge", "merge:Merge", "reconcile: the greatest wish, between floors and ceilings"),
    ):
        registry.add("planner_stage", name, f"dynamo_planner.stages.{target}", summary=summary)
    for name, target, summary in (
        ("planner run", "run:run", "decide how many workers there are, and make it so"),
        ("planner global", "run_global:run_global", "keep one GPU budget over several planners"),
        ("planner explain", "explain:explain", "say why there are so many workers"),
        ("planner what-if", "what_if:what_if", "decide again for another load or other settings"),
        ("planner report", "report:report", "write a page with plots of what was seen, expected and done"),
        ("planner backtest", "backtest:backtest", "replay the predictors on recorded load"),
        ("profile", "profile:profile", "measure what one worker can do, for the planner"),
        ("profile plot", "profile_plot:profile_plot", "draw a profile"),
    ):
        registry.cli(name, f"dynamo_planner.commands.{target}", summary=summary)
