"""The results as a page: docs/performance.md, written by the run that measured them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import budgets, over_vllm, planes
from benchmarks.budgets import of
from benchmarks.scenarios import ALL
from benchmarks.targets import OURS, PEER, TITLES

Results = Mapping[str, Any]

_INTRODUCTION = """\
# Performance

This page is written by `make bench`; `benchmarks/results.json` has every number behind it. CPU is user and system time of the frontend
process and its children, from `/proc`: engines, workers and clients are other processes and not in it. All systems run side by side and take
turns within each scenario, all but one with nothing to do; figures are medians over the repeats, and a ratio is the median of those of each
repeat. Machines differ, and a machine that others use at the same time is slower for all: trust the ratios.

Ours is measured as installed by default, without optional accelerators; no system logs its requests. Each prompt is a text that was never
sent before, of words that were. Every answer is checked: status 200, `[DONE]`, a finish reason, and exactly the tokens that were asked for.
Anything else is an error.
"""

_COMPARING = """\
To compare with ai-dynamo, install it apart and name its folder; both systems then load the same model folder, made by `benchmarks/model.py`:

    make peers PEERS=/tmp/peers     # pip installs ai-dynamo 1.6.1 into /tmp/peers/dyn
    make bench PEERS=/tmp/peers
"""


def page(results: Results) -> str:
    parts = [*_conditions(results), "", "## Budgets", "", *_budgets(results), "", *_scenarios(results), *_idle(results)]
    if "over_vllm" in results:
        parts += ["", *over_vllm.section(results["over_vllm"])]
    return "\n".join([_INTRODUCTION, *parts, "", _COMPARING, planes.known()]).rstrip() + "\n"


def _conditions(results: Results) -> Iterator[str]:
    about = results["about"]
    yield f"Measured {about['date']} on {about['cpus']} x {about['cpu']}, Linux {about['kernel']}, Python {about['python']}, by `{about['command']}`."
    quiet = about["others_cores"] < 0.3
    yield f"Other processes used {about['others_cores']:.1f} cores meanwhile (median)." + ("" if quiet else " **The machine was not quiet.**")
    if PEER not in results["targets"]:
        yield "ai-dynamo was not there, so nothing is compared with it."


def _budgets(results: Results) -> Iterator[str]:
    targets = results["targets"]
    peer: Mapping[str, list[dict[str, Any]]] = targets[PEER]["scenarios"] if PEER in targets else {}
    yield f"| what | server | ours | {TITLES[PEER]} | ratio | budget | met |"
    yield "|---|---|---|---|---|---|---|"
    for budget in budgets.RATIOS:
        theirs = of(peer, budget.scenario, budget.figure)
        for name in OURS:
            ours = of(targets[name]["scenarios"], budget.scenario, budget.figure) if name in targets else None
            ratio = budgets.ratio(targets[name]["scenarios"], peer, budget.scenario, budget.figure) if name in targets else None
            yield _row(budget.title, name, _number(ours, budget.unit), _number(theirs, budget.unit), "-" if ratio is None else f"{ratio:.2f}",
                       f"<= {budget.limits[name]:g} x", _met(ratio, budget.limits[name]))
    for limit in budgets.LIMITS:
        theirs = of(peer, limit.scenario, limit.figure)
        for name in OURS:
            ours = of(targets[name]["scenarios"], limit.scenario, limit.figure) if name in targets else None
            allowed = f"<= {limit.limit:g} {limit.unit}".strip()
            yield _row(limit.title, name, _number(ours, limit.unit), _number(theirs, limit.unit), "-", allowed, _met(ours, limit.limit))
    for figure, unit, limit in (("resident_mb", "MB", budgets.IDLE_MB), ("cpu_percent", "%", budgets.IDLE_PERCENT)):
        for name in OURS:
            ours = _idle_figure(results, name, figure)
            title, peers = "idle, resident memory" if unit == "MB" else "idle, CPU", _idle_figure(results, PEER, figure)
            yield _row(title, name, _number(ours, unit), _number(peers, unit), "-", f"<= {limit:g} {unit}", _met(ours, limit))
    for title, key, unit, limit in (("`dynamo --help`, CPU", "help_cpu_ms", "ms", budgets.HELP_MS),
                                    ("event loop held up by a prompt of 200,000 characters", "stall_ms", "ms", budgets.STALL_MS)):
        yield _row(title, "", _number(results[key], unit), "-", "-", f"<= {limit:g} {unit}", _met(results[key], limit))


def _scenarios(results: Results) -> Iterator[str]:
    for scenario in ALL.values():
        rows = list(_rows(results, scenario.name))
        if rows:
            yield from (f"## {scenario.title[0].upper()}{scenario.title[1:]}", "")
            yield "| system | CPU us/request | CPU us/token | TTFT p50 / p99 ms | gap p99 ms | events a request | peak MB | errors | requests/s |"
            yield "|---|---|---|---|---|---|---|---|---|"
            yield from (*rows, "")


def _rows(results: Results, scenario: str) -> Iterator[str]:
    for name, target in results["targets"].items():
        runs: Sequence[Mapping[str, Any]] = [run for run in target["scenarios"].get(scenario, ()) if run.get("done")]
        if not runs:
            continue
        cost = sorted(budgets.per_request(run) for run in runs)

        def middle(group: str, quantile: str, runs: Sequence[Mapping[str, Any]] = runs) -> str:
            values = [run[group][quantile] for run in runs if run[group]]
            return f"{median(values):.1f}" if values else "-"

        yield _row(
            TITLES[name], f"{median(cost):,.0f} ({cost[0]:,.0f} to {cost[-1]:,.0f})", f"{median(budgets.per_token(run) for run in runs):.1f}",
            f"{middle('ttft_ms', 'p50')} / {middle('ttft_ms', 'p99')}", middle("itl_ms", "p99"), f"{median(run['events_per_request'] for run in runs):.1f}",
            f"{max(budgets.peak(run) for run in runs):.0f}", f"{sum(run['errors'] for run in target['scenarios'][scenario]):.0f}",
            f"{median(run['requests_per_s'] for run in runs):,.0f}",
        )


def _idle(results: Results) -> Iterator[str]:
    yield from ("## Idle", "", "| system | resident MB | CPU % | threads | seconds to the first answer |", "|---|---|---|---|---|")
    for name, target in results["targets"].items():
        if target["idle"]:
            figures = [median(run[figure] for run in target["idle"]) for figure in ("resident_mb", "cpu_percent", "threads")]
            yield _row(TITLES[name], f"{figures[0]:.0f}", f"{figures[1]:.2f}", f"{figures[2]:.0f}", f"{median(target['ready_s']):.1f}")


def _idle_figure(results: Results, name: str, figure: str) -> float | None:
    runs = results["targets"].get(name, {}).get("idle")
    return median(run[figure] for run in runs) if runs else None


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:,.{0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2}f} {unit}".strip()


def _met(value: float | None, limit: float) -> str:
    return "not measured" if value is None else "yes" if value <= limit else "**no**"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
