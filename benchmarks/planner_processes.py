"""Some minutes of traffic through real processes: a frontend, the planner, the workers that it starts and drains, and clients that count; a trial for each mode.

    python -m benchmarks.planner_processes [--only NAME;...] [--scale 1.0] [--seed 1] [--report docs/planner.md]

Nothing is simulated but the engines, and their time is real. Every trial gets the same requests at the same times. What `dynamo profile` finds out about one worker, at the beginning, is what the planner
knows of the engine. Results are kept in .dynamo/bench, so that single trials can be measured again; `--report` replaces the part of the page between its two marks, and the plot
beside it.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import attrs
import msgspec

from benchmarks import planner_site as site
from benchmarks.planner import figure
from benchmarks.planner_fleet import turns
from benchmarks.planner_loads import Rush, rush
from dynamo_planner.explain.svg import Line
from dynamo_planner.performance import profile as profiles
from dynamo_planner.stages import capacity

WORK = site.ROOT / ".dynamo/bench/planner-processes"
TTFT, ITL, SHARE = 0.5, 0.025, 0.95
WITHIN = 40.0
"""Seconds in which a change of direction is a turn: twice the length of the spike, as for the drawn day."""
MARKS = ("<!-- written by benchmarks.planner_processes -->", "<!-- end -->")
BOTH, APART = ("aggregated",), ("prefill", "decode")
GRID = ("--inputs=500,2000,4000,6000,8000", "--contexts=2000,4000,6000", "--concurrency=1,4,8,16,24")
SHORT_GRID = ("--inputs=500,4000,8000", "--contexts=4000", "--concurrency=1,8,16", "--repeat=1")
"""For trials that are not to be quoted."""
_SLA, _LOAD, _TOGETHER = '["sla"]', '["load"]', '["sla", "load"]'


@attrs.frozen
class Trial:
    name: str
    propose: str = _TOGETHER
    predictor: str = "kalman"
    kind: Literal["planner", "oracle", "peak", "mean"] = "planner"
    """`peak` and `mean`: a fleet for that load, which never changes."""
    roles: tuple[str, ...] = BOTH


_ALWAYS = (Trial("static, for the peak", kind="peak"), Trial("static, for the mean", kind="mean"), Trial("oracle", _SLA, kind="oracle"), Trial("load", _LOAD))
_CHOSEN = (Trial("sla, kalman", _SLA), Trial("sla and load, kalman"))
PREFIX = "prefill and decode: "
TRIALS = (
    *_ALWAYS, Trial("sla, constant", _SLA, "constant"), Trial("sla, ets", _SLA, "ets"), *_CHOSEN,
    *(attrs.evolve(trial, name=PREFIX + trial.name, roles=APART) for trial in (*_ALWAYS, *_CHOSEN)),
)


class Result(msgspec.Struct, frozen=True):
    requests: int
    failed: int
    """Of all requests, those of the lead in as well."""
    on_time: int
    late_first: int
    slow: int
    cold: int
    """Requests that were due while no worker was ready."""
    gpu_seconds: float
    changes: int
    turns: int
    cores: float
    """That all processes of the trial used in the busiest five seconds."""
    others: float
    """Cores that the rest of the machine used, on average."""
    lag: float
    """Seconds by which the 99th percentile of requests was sent late."""
    desired: list[tuple[float, float]]
    ready: list[tuple[float, float]]


def table(trial: Trial, profile: Path, most: int) -> str:
    """The `[planner]` of a trial. Times have about the proportions of the drawn day: an interval is a cold start, a tick a quarter of it."""
    roles = ", ".join(f'"{role}"' for role in trial.roles)
    gpus = ", ".join(f"{role} = 1" for role in trial.roles)
    none = ", ".join(f"{role} = 0" for role in trial.roles)
    more = {
        "planner": f'predictor = "{trial.predictor}"\nidle = "6s"\n',
        "oracle": f'predict = {{ use = "oracle", file = "{{folder}}/future.json" }}\nminimum = {{ {none} }}\n',
    }.get(trial.kind, "dry_run = true\n")
    return f'''
[planner]
use = "standard"
connector = {{ use = "local", gpus = {{ {gpus} }}, models = ["{site.MODEL}"] }}
roles = [{roles}]
ttft = "{TTFT}s"
itl = "{ITL}s"
share = {SHARE}
profile = "{profile}"
tick = "1s"
interval = "4s"
cold_start = "4s"
patience = "6s"
propose = {trial.propose}
gpus = {most}
record = "{{folder}}/decisions.jsonl"
{more}
[planner.metrics]
frontends = ["http://127.0.0.1:{{port}}"]
'''


def run(trial: Trial, load: Rush, profile: Path, folder: Path) -> Result:
    most = 8 if trial.roles == BOTH else 10
    counts = dict.fromkeys(trial.roles, 2 if trial.roles == BOTH else 1)
    if trial.kind in ("peak", "mean"):
        rates = load.rates[int(load.lead) :]
        counts = need(trial.roles, float(rates.max() if trial.kind == "peak" else rates.mean()), load, profile)
    return result(site.observe(folder, counts, table(trial, profile, most), load), load)


def need(roles: Sequence[str], rate: float, load: Rush, profile: Path) -> dict[str, int]:
    demand, known = capacity.Demand(rate, load.prompt, load.output), profiles.load(profile)
    if len(roles) == 1:
        return {roles[0]: capacity.aggregated(demand, known, TTFT, ITL, SHARE).replicas}
    return {"prefill": capacity.prefill(demand, known, TTFT, SHARE).replicas, "decode": capacity.decode(demand, known, ITL, SHARE).replicas}


def result(seen: site.Seen, load: Rush) -> Result:
    begin, end = seen.start + load.lead, seen.start + len(load.rates)
    answers = [answer for answer in seen.answers if answer.at >= load.lead]
    good = [answer for answer in answers if not answer.wrong]
    decisions = [decision for decision in seen.decisions if begin <= decision.at <= end and decision.fleet]
    looks = [look for look in seen.looks if begin <= look.at <= end]
    ready = [(d.at - begin, float(min(role.ready for role in d.fleet.values()))) for d in decisions]
    cold = [(at, later) for (at, count), (later, _) in pairwise(ready) if not count]
    scaled = [decision for decision in decisions if decision.action == "scaled"]
    changes = {role: [(d.at, d.targets[role]) for d in scaled if d.targets[role] != d.fleet[role].desired] for role in (decisions[0].fleet if decisions else ())}
    used = [(look.at, look.cpu["machine"], sum(look.cpu[part] for part in ("frontend", "planner", "client"))) for look in looks]
    five = round(5 / site.LOOK)
    windows = [(later[2] - before[2]) / (later[0] - before[0]) for before, later in zip(used, used[five:], strict=False)]
    whole = (used[-1][1] - used[0][1] - used[-1][2] + used[0][2]) / (used[-1][0] - used[0][0])
    return Result(
        requests=len(answers), failed=sum(bool(answer.wrong) for answer in seen.answers),
        on_time=sum(a.ttft <= TTFT and a.itl <= ITL for a in good), late_first=sum(a.ttft > TTFT for a in good), slow=sum(a.itl > ITL for a in good),
        cold=sum(any(at <= a.at - load.lead < later for at, later in cold) for a in answers),
        gpu_seconds=sum(before.workers * (later.at - before.at) for before, later in pairwise(looks)), changes=len(scaled),
        turns=sum(turns(part, WITHIN) for part in changes.values()), cores=max(windows, default=0.0), others=whole,
        lag=sorted(a.lag for a in answers)[int(0.99 * len(answers))],
        desired=[(d.at - begin, float(sum(role.desired for role in d.fleet.values()))) for d in decisions],
        ready=[(d.at - begin, float(sum(role.ready for role in d.fleet.values()))) for d in decisions],
    )


# ------------------------------------------------------------------ the page


def rows(title: str, found: Mapping[str, Result]) -> str:
    lines = [f"| {title} | requests on time | late first token | slow tokens | failed | cold | GPU seconds | changes | turns | cores |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, r in found.items():
        lines.append(f"| {name.removeprefix(PREFIX)} | {r.on_time / r.requests:.2%} | {r.late_first / r.requests:.2%} | {r.slow / r.requests:.2%} | {r.failed} | {r.cold / r.requests:.2%} "
                     f"| {r.gpu_seconds:.0f} | {r.changes} | {r.turns} | {r.cores:.2f} |")
    return "\n".join(lines)


def text(found: Mapping[str, Result]) -> str:
    parts = {"workers that do both": [n for n in found if not n.startswith(PREFIX)], "prefill and decode workers": [n for n in found if n.startswith(PREFIX)]}
    return "\n\n".join(rows(title, {name: found[name] for name in names}) for title, names in parts.items() if names)


def picture(found: Mapping[str, Result], load: Rush) -> str:
    lines: list[Line] = []
    for name, wanted, there in (("oracle", "#8fb4dc", "#3572b0"), ("load", "#e9b48f", "#c8641e"), ("sla and load, kalman", "#94cda0", "#3a8f4b")):
        if name in found:
            lines += [Line(f"{name}: wanted", found[name].desired, wanted, steps=True), Line(f"{name}: ready", found[name].ready, there, steps=True)]
    lines.append(Line("requests/s offered", [(float(i), float(rate)) for i, rate in enumerate(load.rates[int(load.lead) :])], "#999999"))
    return figure("Real processes: load, and replicas that do both", "requests/s, replicas", lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of: {'; '.join(trial.name for trial in TRIALS)}; separated by ;")
    parser.add_argument("--scale", type=float, default=1.0, help="length of the traffic; below 1 to see that it works, not to quote")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(";") if name.strip()]
    if unknown := set(names) - {trial.name for trial in TRIALS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without the processes that were started
    load = rush(options.seed, options.scale)
    runs, kept = WORK / "runs", WORK / f"results-{options.seed}-{options.scale:g}.json"
    shutil.rmtree(runs, ignore_errors=True)
    found = msgspec.json.decode(kept.read_bytes(), type=dict[str, Result]) if names and kept.exists() else {}
    profile = site.profile(runs / "profile", GRID if options.scale >= 1 else SHORT_GRID)
    for i, trial in enumerate(TRIALS):
        if names and trial.name not in names:
            continue
        found[trial.name] = r = run(trial, load, profile, runs / f"trial-{i}")
        kept.write_bytes(msgspec.json.encode(found))
        print(f"{trial.name}: {r.on_time / r.requests:.2%} of {r.requests} on time, {r.failed} failed, {r.gpu_seconds:.0f} GPU s; the busiest 5 s used {r.cores:.2f} cores, "
              f"others {r.others:.2f}; requests were sent up to {r.lag * 1000:.0f} ms late", file=sys.stderr, flush=True)
    found = {trial.name: found[trial.name] for trial in TRIALS if trial.name in found}
    page = text(found)
    print(page)
    if options.report is not None:
        before, _, rest = options.report.read_text().partition(MARKS[0])
        options.report.write_text(f"{before}{MARKS[0]}\n{page}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        options.report.with_name("planner-processes.svg").write_text(picture(found, load))
    return 0


if __name__ == "__main__":
    sys.exit(main())
