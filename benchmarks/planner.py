"""A day of traffic through the planner, in virtual time: what each predictor and each mode costs, and what it keeps; with prefill and decode
workers, and with workers that do both.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.planner [--seeds 1,2] [--scale 1.0] [--only NAME;...] [--report docs/planner.md]

Several threads for small matrices only wait for each other. The planner is the production one, tick by tick; the fleet is simulated (`planner_fleet.py`). The day before is in the planner's history.
`--report` replaces the part of the page between its two marks, and the plot beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, Literal

import attrs
import numpy as np

from benchmarks.planner_fleet import SimulatedFleet, profile
from benchmarks.planner_loads import Day, day, recorded, recorded_day
from dynamo_core.config import Use
from dynamo_core.plugins import Plugins
from dynamo_planner import build as parts
from dynamo_planner.config import Metrics, Planner, Role
from dynamo_planner.contract import Expected, Floats, Forecast, Load, Outlook, Predictor, View
from dynamo_planner.explain.svg import Line, plot
from dynamo_planner.performance.profile import Measured
from dynamo_planner.planning import Planning
from dynamo_planner.predict.backtest import Score, backtest
from dynamo_planner.stages import capacity

TICK, INTERVAL, COLD, ITL = 30, 120, 120.0, 0.025
PREDICTORS = ("constant", "seasonal-naive", "ewma", "kalman", "kalman-trend", "arima", "ets")
MARKS = ("<!-- written by benchmarks.planner -->", "<!-- end -->")


@attrs.frozen
class Oracle:
    """A predict stage that knows the rates to come, though not the single arrivals."""

    stage: ClassVar[Literal["predict"]] = "predict"
    day: Day

    def predict(self, view: View) -> Outlook | None:
        ahead = slice(int(view.at), int(view.at + view.cold_start + 2 * view.interval))
        arrivals = self.day.arrivals[ahead]
        if arrivals.size < 60:
            return None
        rate = float(np.convolve(arrivals, np.ones(60) / 60, "valid").max())
        sizes = [float(part[ahead].max()) for part in (self.day.prompt, self.day.output)]
        return Outlook(*(Expected(value, value, value) for value in (rate, *sizes)), by="oracle")


@attrs.frozen
class Traffic:
    name: str
    """Of its tables."""
    day: Callable[..., Day]
    """By seed and scale."""
    ttft: float


DRAWN = Traffic("a drawn day", day, 0.5)
RECORDED = Traffic("a day of recorded traffic", recorded_day, 2.0)
"""Its prompts are of all lengths: one in thirty takes longer than this to read, even alone."""


@attrs.frozen
class Trial:
    name: str
    predictor: str = "kalman"
    propose: tuple[Use, ...] = (Use("sla"), Use("load"))
    kind: Literal["planner", "oracle", "peak", "mean"] = "planner"
    """`peak` and `mean`: a fleet for that load, which never changes."""
    patience: float = 180.0
    roles: tuple[Role, ...] = ("prefill", "decode")
    traffic: Traffic = DRAWN

    @property
    def table(self) -> str:
        """The title of the table that it belongs to."""
        return f"{self.traffic.name}: {'workers that do both' if len(self.roles) == 1 else 'prefill and decode workers'}"

    @property
    def row(self) -> str:
        return self.name.rpartition(": ")[2]


DO_BOTH, OF_RECORD = "aggregated: ", "recorded: "
"""Before the names of trials with workers that read and decode, and of those with recorded traffic."""
_SLA, _MEAN = (Use("sla"),), Use("sla", {"plan_for": "mean"})
_ALWAYS: tuple[Trial, ...] = (Trial("static, for the peak", kind="peak"), Trial("static, for the mean", kind="mean"), Trial("oracle", propose=_SLA, kind="oracle"),
                              Trial("load", propose=(Use("load"),)))
_TOGETHER: tuple[Trial, ...] = tuple(Trial(f"sla and load, {name}", name) for name in PREDICTORS)
_DRAWN: tuple[Trial, ...] = (
    *_ALWAYS, *(Trial(f"sla, {name}", name, _SLA) for name in PREDICTORS), *_TOGETHER,
    Trial("sla and load, kalman, for the mean", propose=(_MEAN, Use("load"))),
    Trial("sla and load, kalman, patience 600 s", patience=600.0),
    *(attrs.evolve(trial, name=DO_BOTH + trial.name, roles=("aggregated",)) for trial in (*_ALWAYS, Trial("sla, kalman", propose=_SLA), *_TOGETHER)),
)
_AGAIN = {trial.name for trial in _ALWAYS} | {"sla, kalman", "sla, ets", "sla and load, constant", "sla and load, kalman", "sla and load, ets"}
TRIALS = (*_DRAWN, *(attrs.evolve(trial, name=OF_RECORD + trial.name, traffic=RECORDED) for trial in _DRAWN if trial.row in _AGAIN))


@attrs.define
class Remembering:
    """A predictor that is asked nothing twice. The load of a day does not depend on the fleet, so neither do the questions of trials."""

    min_points: ClassVar[int] = 24
    """What the most demanding one needs."""
    seasonal: ClassVar[bool] = False
    predictor: Predictor
    answers: dict[tuple[int, bytes, float], Forecast] = attrs.field(factory=dict)

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        key = (steps, hashlib.blake2b(history.tobytes()).digest(), level)
        if key not in self.answers:
            self.answers[key] = self.predictor.forecast(history, steps, level)
        return self.answers[key]


class RememberingSeason(Remembering):
    seasonal = True


@attrs.frozen
class Result:
    attained: float
    gpu_hours: float
    changes: int
    turns: int
    """Changes of direction within half an hour."""
    late_first: float
    late_between: float
    seconds: float
    replicas: Sequence[tuple[float, float | None]] = ()


def run(trial: Trial, today: Day, before: Day, remembering: dict[str, Remembering]) -> Result:
    began = time.perf_counter()
    ttft = trial.traffic.ttft
    fleet = SimulatedFleet(today, ttft, ITL, COLD, trial.roles)
    length = int(today.arrivals.size)
    measured = Measured.of(profile(), "the timing model")
    if trial.kind in ("peak", "mean"):
        rates = today.counts(60) / 60
        fleet.start_with(_need(trial, float(rates.max() if trial.kind == "peak" else rates.mean()), today, measured))
        fleet.advance(length)
        return _result(fleet, 0, 0, began, [])
    table = Planner(
        metrics=Metrics(frontends=("http://127.0.0.1:1",)), roles=trial.roles, ttft=ttft, itl=ITL, tick=float(TICK), interval=float(INTERVAL),
        cold_start=COLD, predictor=_predictor(trial.predictor, length), propose=trial.propose, gpus=40, patience=trial.patience,
    )
    mind = parts.mind(table, Plugins.load())
    mind.profile = measured
    kind = RememberingSeason if mind.predictor.seasonal else Remembering
    mind.predictor = remembering.setdefault(trial.predictor, kind(mind.predictor))
    if trial.kind == "oracle":
        mind.stages.predict = Oracle(today)
    for i, count in enumerate(before.counts(INTERVAL)):
        at = slice(i * INTERVAL, (i + 1) * INTERVAL)
        mind.history.restore(Load(float(i * INTERVAL - length), INTERVAL, float(count) / INTERVAL, float(before.prompt[at].mean()), float(before.output[at].mean()),
                                  prompt_spread=before.spread()))
    planning = Planning(mind, fleet, fleet, fleet)
    shown: list[tuple[float, float | None]] = []

    async def through() -> int:
        changes = 0
        for at in range(0, length, TICK):
            decision = await planning.tick(float(at))
            if decision.action in ("failed", "refused"):
                raise RuntimeError(decision.result)
            changes += decision.action == "scaled"
            shown.append((float(at), float(sum(seen.desired for seen in decision.fleet.values()))))
            fleet.advance(min(TICK, length - at))
        return changes

    return _result(fleet, asyncio.run(through()), fleet.turns(1800), began, shown)


def _result(fleet: SimulatedFleet, changes: int, turns: int, began: float, shown: Sequence[tuple[float, float | None]]) -> Result:
    waiting = fleet.unfinished()
    asked = max(1, fleet.served + waiting)
    return Result(fleet.on_time / asked, fleet.gpu_seconds / 3600, changes, turns, fleet.late_first / asked, fleet.late_between / asked,
                  time.perf_counter() - began, shown)


def _need(trial: Trial, rate: float, today: Day, measured: Measured) -> dict[str, int]:
    demand = capacity.Demand(rate, float(today.prompt.mean()), float(today.output.mean()), prompt_spread=today.spread())
    if len(trial.roles) == 1:
        return {trial.roles[0]: capacity.aggregated(demand, measured, trial.traffic.ttft, ITL, 0.95).replicas}
    return {"prefill": capacity.prefill(demand, measured, trial.traffic.ttft, 0.95).replicas, "decode": capacity.decode(demand, measured, ITL, 0.95).replicas}


def _predictor(name: str, length: int) -> Use:
    """A season is a day, whatever the day's length."""
    if name == "oracle":
        return Use("constant")
    return Use(name, {"season": length // INTERVAL, "recent": 15} if name == "seasonal-naive" else {})


# ------------------------------------------------------------------ the page


def table_of_days(title: str, found: Mapping[str, Sequence[Result]]) -> str:
    rows = [f"| {title} | requests on time | late first token | slow tokens | GPU hours | changes | turns |", "|---|---|---|---|---|---|---|"]
    for name, results in found.items():
        def of(part: str, results: Sequence[Result] = results) -> float:
            return mean(getattr(result, part) for result in results)

        rows.append(f"| {name.rpartition(': ')[2]} | {of('attained'):.2%} | {of('late_first'):.2%} | {of('late_between'):.2%} | {of('gpu_hours'):.0f} | {of('changes'):.0f} | {of('turns'):.0f} |")
    return "\n".join(rows)


def table_of_scores(title: str, scores: Sequence[Score]) -> str:
    rows = [f"| {title} | error | too low by | inside the interval | ms a forecast |", "|---|---|---|---|---|"]
    rows += [f"| {s.name} | {s.error:.1%} | {s.under:.1%} | {s.covered:.0%} | {s.milliseconds:.1f} |" for s in scores]
    return "\n".join(rows)


def backtests(seeds: Sequence[int], scale: float) -> str:
    plugins = Plugins.load()
    tables: list[str] = []
    days = np.concatenate([day(seed, scale=scale).counts(INTERVAL) for seed in (seeds[0] + 1000, seeds[0])])
    steps = math.ceil(COLD / INTERVAL) + 1
    for title, series, every, skip, season in (
        ("two drawn days, 120 s a point", days, 11, days.size // 2, days.size // 2), ("recorded half hour, 10 s a point", recorded(), 3, 60, None),
    ):
        made: dict[str, Any] = {}
        for name in PREDICTORS:
            kind: Any = plugins.find("predictor", name).load()
            if name == "seasonal-naive":
                if season is not None:
                    made[name] = kind(season=season)
                continue
            made[name] = kind()
        tables.append(table_of_scores(title, backtest(made, series, steps=steps, every=every, skip=skip)))
    return "\n\n".join(tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--scale", type=float, default=1.0, help="length of a day; below 1 to see that it works, not to quote")
    parser.add_argument("--only", default="", help=f"of: {'; '.join(trial.name for trial in TRIALS)}; separated by ;")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    names = [name.strip() for name in options.only.split(";") if name.strip()]
    if unknown := set(names) - {trial.name for trial in TRIALS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    found: dict[str, list[Result]] = {}
    remembering: dict[tuple[str, int], dict[str, Remembering]] = {}
    for trial in TRIALS:
        if names and trial.name not in names:
            continue
        make = trial.traffic.day
        found[trial.name] = [run(trial, make(seed, scale=options.scale), make(seed + 1000, scale=options.scale),
                                 remembering.setdefault((trial.traffic.name, seed), {})) for seed in seeds]
        print(f"{trial.name}: {mean(r.attained for r in found[trial.name]):.2%}, {mean(r.gpu_hours for r in found[trial.name]):.0f} GPU h, "
              f"{sum(r.seconds for r in found[trial.name]):.0f} s", file=sys.stderr, flush=True)
    titles = dict.fromkeys(trial.table for trial in TRIALS)
    by_table = {title: {trial.name: found[trial.name] for trial in TRIALS if trial.table == title and trial.name in found} for title in titles}
    tables = [table_of_days(title, part) for title, part in by_table.items() if part]
    text = "\n\n".join([*tables, *([] if names else [backtests(seeds, options.scale)])])
    print(text)
    if options.report is not None:
        before, _, rest = options.report.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        options.report.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
        picture = options.report.with_suffix(".svg")
        picture.write_text(_picture(found, day(seeds[0], scale=options.scale)))
    return 0


def _picture(found: Mapping[str, Sequence[Result]], today: Day) -> str:
    colours = ("#3572b0", "#c8641e", "#3a8f4b", "#8d4ea8")
    chosen = [name for name in ("oracle", "load", "sla, kalman", "sla and load, kalman") if name in found]
    lines = [Line(name, found[name][0].replicas, colour, steps=True) for name, colour in zip(chosen, colours, strict=False)]
    lines.append(Line("requests/s", [(i * 60.0, float(count) / 60) for i, count in enumerate(today.counts(60))], "#999999"))
    return figure("A drawn day: load, and replicas of both roles", "requests/s, replicas", lines)


def figure(title: str, unit: str, lines: Sequence[Line]) -> str:
    """A picture of its own, with a legend, for a page."""
    inside = plot(title, unit, lines)
    inner = inside[inside.index("<svg") : inside.index("</svg>")]
    legend = "".join(f'<text x="70" y="{22 + 13 * i}" style="fill:{line.colour}">{line.name}</text>' for i, line in enumerate(lines))
    style = "<style>text{font:11px sans-serif;fill:#777}.grid{stroke:#999;opacity:.3}</style>"
    return inner.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f">{style}", 1) + legend + "</svg>\n"


if __name__ == "__main__":
    sys.exit(main())
