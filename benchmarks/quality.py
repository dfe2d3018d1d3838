"""How well requests are routed: policies side by side on request traces, in virtual time. Writes docs/routing-quality.md.

    python -m benchmarks.quality TRACE.jsonl            # a recorded trace and three made ones; hours on two cores
    python -m benchmarks.quality TRACE.jsonl@3000       # the recorded trace from its 3,001st request on
    python -m benchmarks.quality --brief --requests 1500 --jobs 1  # the three stacks that matter, a quarter of an hour or two
    python -m benchmarks.quality --quick                # fewer scenarios
    python -m benchmarks.quality --quick --requests 400 # only to see that it works

Loads are shares of the time that the workers would spend on prompts if no cache ever forgot anything. Overload, where the order of the queue is what
matters, is looked at with the fewest workers alone. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import islice, product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import attrs

from dynamo_kv_router.presets import QUEUE
from dynamo_sim.replay.command import resolve
from dynamo_sim.replay.report import report
from dynamo_sim.replay.simulate import Options, simulate
from dynamo_sim.replay.synthetic import KINDS
from dynamo_sim.replay.trace import Trace, read
from dynamo_sim.scheduler import Limits

PAGE = Path(__file__).parent.parent / "docs" / "routing-quality.md"
SEED = 2024
"""Of the made traces. Weights were chosen on other seeds."""
STACKS = {
    "round-robin": "round-robin",
    "least-loaded": "least-loaded",
    "kv": "kv",
    "kv, tuned": "kv:prefill_scale=16",
    "kv-plus": "kv-plus",
}
PATIENT = """
[router]
use = "kv-plus"
[router.queue]
prefill_tokens = %d
wait_for = "best"
order = "%s"
ageing = %d
limit = 100000
max_wait = 3600
"""
"""The queue of `kv-plus` without the limits at which it refuses, so that everybody is served and counted."""
OVERLOAD = {
    **{name: stack for name, stack in STACKS.items() if name != "kv-plus"},
    "kv-plus, fcfs": PATIENT % (QUEUE.prefill_tokens, "fcfs", 0),
    "kv-plus, shortest, ageing": PATIENT % (QUEUE.prefill_tokens, "shortest", 2000),
    "kv-plus, shortest": PATIENT % (QUEUE.prefill_tokens, "shortest", 0),
}
"""Where more comes than can be served, the order of the queue is what matters."""
IDEAL = {
    "kv-plus, one cache": "kv-plus",
    "kv-plus, answers first, one cache": "kv-plus:slowdown_weight=1,decode_weight=2",
}
"""On a fleet whose workers share one cache, which costs nothing to read: a prompt has no better place than another, and load alone decides."""
LOADS = {"low": 0.12, "middle": 0.24, "high": 0.36, "overload": 0.6}
BLOCKS = {"polynomial": 16384, "roofline": 6672}
"""KV blocks of 64 tokens: a million tokens, and what an 8-billion-parameter model leaves free on an 80 GB GPU."""


@attrs.frozen
class Scenario:
    trace: str
    timing: str
    workers: int
    load: str

    def __str__(self) -> str:
        return f"{self.trace} {self.timing} {self.workers} {self.load}"


def the_trace(name: str, requests: int) -> Trace:
    """:param name: of a kind, or a path, or `PATH@N`: without the first N lines."""
    if name in KINDS:
        return KINDS[name](requests, seed=SEED)
    path, _, skip = name.partition("@")
    if not skip:
        return read(Path(path), limit=requests)
    with Path(path).open("rb") as whole, NamedTemporaryFile(suffix=".jsonl") as rest:
        rest.writelines(islice(whole, int(skip), int(skip) + requests))
        rest.flush()
        return read(Path(rest.name))


def rate_for(trace: Trace, options: Options, load: float) -> float:
    """How much faster than in the trace requests must come for this load."""
    seen: set[int] = set()
    work = 0.0
    timing, most = options.make_timing(), options.limits.max_batched_tokens
    for i in range(len(trace)):
        held = 0
        ids = trace.ids[trace.start[i] : trace.start[i + 1]].tolist()
        for block in ids:
            if block not in seen:
                break
            held += trace.block
        seen.update(ids)
        done, prompt = min(held, int(trace.prompt[i]) - 1), int(trace.prompt[i])
        while done < prompt:
            count = min(most, prompt - done)
            work += timing.step_ms(count, 0, 0.0, count * (done + count / 2))
            done += count
    free = trace.arrival if trace.after is None else trace.arrival[trace.after < 0]
    return load * options.workers * float(free.max()) / work


def run(scenario: Scenario, stack: str, requests: int, shared_cache: bool = False) -> dict[str, Any]:
    trace = the_trace(scenario.trace, requests)
    limits = Limits(total_blocks=BLOCKS[scenario.timing])
    options = Options(workers=scenario.workers, timing=scenario.timing, limits=limits, shared_cache=shared_cache)
    options = attrs.evolve(options, rate=rate_for(trace, options, LOADS[scenario.load]))
    router, plugins = resolve_any(stack)
    outcome = simulate(trace, router, plugins, options)
    return {**report(stack, trace, outcome).to_dict(), "rate": options.rate, "cpu_s": outcome.wall_s}


def resolve_any(stack: str) -> Any:
    if "\n" not in stack:
        return resolve(stack)
    from dynamo_core.config import load_with_plugins

    config, plugins = load_with_plugins(text=stack, environ={})
    return config.router, plugins


# ------------------------------------------------------------------ the page

MEASURES = {
    "TTFT mean": ("ttft_ms", "mean"), "TTFT p50": ("ttft_ms", "p50"), "TTFT p99": ("ttft_ms", "p99"), "ITL mean": ("itl_ms", "mean"),
    "e2e mean": ("e2e_ms", "mean"), "e2e p99": ("e2e_ms", "p99"), "hit rate": ("hit_rate", None),
}
Results = dict[Scenario, dict[str, dict[str, Any]]]


def value(result: dict[str, Any], measure: str) -> float:
    key, part = MEASURES[measure]
    return float(result[key][part] if part else result[key])


def mean_ratio(results: Sequence[dict[str, dict[str, Any]]], stack: str, base: str, measure: str) -> tuple[float, float]:
    """Geometric mean, and the greatest."""
    logs = [math.log(value(r[stack], measure) / value(r[base], measure)) for r in results if value(r[base], measure) > 0 and value(r[stack], measure) > 0]
    return (math.exp(sum(logs) / len(logs)), math.exp(max(logs))) if logs else (float("nan"), float("nan"))


def page(results: Results, about: str) -> str:
    lines = [
        "# Routing quality", "",
        "How well requests are routed, by replay of request traces in virtual time through the production router.",
        "Written by `python -m benchmarks.quality`; do not edit.", "",
        about, "",
        "`kv` is NVIDIA Dynamo's cost function with its default weights; `kv, tuned` the same with `prefill_scale = 16`. The prices that `kv-plus` uses are learned",
        f"during the run: each starts from nothing. Weights were chosen on other seeds of the made traces (here: {SEED}) and on the first 3,000 requests of the",
        "recorded one; `@N` says that its first N were left out.", "",
        *goals(results),
    ]
    for title, base in (("`kv`", "kv"), ("`kv, tuned`", "kv, tuned")):
        lines += [f"## Ratio to {title}", "", "Geometric means over the scenarios that are not overloaded; in brackets the worst of them."]
        lines += ["Below 1 is better, but for the hit rate.", ""]
        for trace in [*dict.fromkeys(s.trace for s in results), ""]:
            chosen = [r for s, r in results.items() if s.load != "overload" and trace in (s.trace, "")]
            if chosen:
                name = f"`{Path(trace).stem}`" if trace else "all"
                lines += ["", f"| {name} ({len(chosen)}) | " + " | ".join(MEASURES) + " |", "|---|" + "---|" * len(MEASURES)]
                for stack in chosen[0]:
                    if stack not in IDEAL:
                        cells = ["{:.2f} ({:.2f})".format(*mean_ratio(chosen, stack, base, m)) for m in MEASURES]
                        lines.append(f"| {stack} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [*ideal(results), *by_workers(results), *overload(results)]
    lines += ["## Every scenario", "", "Milliseconds. Busy: working time of the busiest worker over the mean. Refused: answered 529 by the router's queue.", ""]
    lines += ["| trace | timing | workers | load | rate | stack | " + " | ".join(MEASURES) + " | busy | refused |", "|---|" + "---|" * (len(MEASURES) + 7)]
    for s, by_stack in results.items():
        for stack, r in by_stack.items():
            cells = [f"{value(r, m):.3f}" if m == "hit rate" else f"{value(r, m):.1f}" for m in MEASURES]
            where = f"| {Path(s.trace).stem} | {s.timing} | {s.workers} | {s.load} | {r['rate']:.2f} | {stack} "
            lines.append(f"{where}| {' | '.join(cells)} | {r['busy_spread']:.2f} | {r['refused']} |")
    return "\n".join(lines) + "\n"


def goals(results: Results) -> list[str]:
    """What `kv-plus` is to reach, and whether it does."""
    calm = [r for s, r in results.items() if s.load != "overload"]
    lines = ["## Goals", "", "| over all that is not overloaded | goal | `kv-plus` | |", "|---|---|---|---|"]
    for measure, base, goal in (("TTFT mean", "kv", 0.75), ("TTFT mean", "kv, tuned", 0.9), ("e2e mean", "kv, tuned", 0.85)):
        ratio, _ = mean_ratio(calm, "kv-plus", base, measure)
        lines.append(f"| {measure}, ratio to `{base}` | {goal:.2f} | {ratio:.2f} | {'met' if ratio <= goal else 'missed'} |")
    for base in ("kv", "kv, tuned"):
        worst = [value(r["kv-plus"], "TTFT p99") / value(r[base], "TTFT p99") for r in calm]
        worse = sum(ratio > 1.005 for ratio in worst)
        lines.append(f"| TTFT p99 never above `{base}` | 0 of {len(calm)} | {worse} of {len(calm)}, at most {max(worst):.2f} | {'missed' if worse else 'met'} |")
    return [*lines, ""]


def ideal(results: Results) -> list[str]:
    lines = [
        "## What placing could bring at most", "",
        "Here each worker has in its cache what any worker has (`dynamo replay --shared-cache`), so that load alone decides where a request goes best.",
        f"*Answers first*: `{IDEAL['kv-plus, answers first, one cache']}`. Ratio to `kv, tuned` on the fleet whose workers have caches of their own.", "",
        "| load, stack | " + " | ".join(MEASURES) + " |", "|---|" + "---|" * len(MEASURES),
    ]
    for load in [*(load for load in LOADS if load != "overload"), "all"]:
        chosen = [r for s, r in results.items() if s.load != "overload" and load in (s.load, "all")]
        for stack in ("kv-plus", *IDEAL) if chosen else ():
            lines.append(f"| {load}, {stack} | " + " | ".join(f"{mean_ratio(chosen, stack, 'kv, tuned', m)[0]:.2f}" for m in MEASURES) + " |")
    return [*lines, ""]


def by_workers(results: Results) -> list[str]:
    lines = ["## `kv-plus` by size of the fleet", "", "Ratio to `kv`, and to `kv, tuned`.", "", "| workers, timing | " + " | ".join(MEASURES) + " |"]
    lines.append("|---|" + "---|" * len(MEASURES))
    for workers, timing in sorted({(s.workers, s.timing) for s in results}):
        chosen = [r for s, r in results.items() if s.load != "overload" and (s.workers, s.timing) == (workers, timing)]
        if chosen:
            cells = [" / ".join(f"{mean_ratio(chosen, 'kv-plus', base, m)[0]:.2f}" for base in ("kv", "kv, tuned")) for m in MEASURES]
            lines.append(f"| {workers}, {timing} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def overload(results: Results) -> list[str]:
    chosen = [r for s, r in results.items() if s.load == "overload"]
    if not chosen:
        return []
    lines = ["## Overload", "", "More comes than can be served, and nobody is refused: the order of the queue decides. Ratio to `kv`; in brackets the worst scenario.", ""]
    lines += [f"| ({len(chosen)}) | " + " | ".join(MEASURES) + " |", "|---|" + "---|" * len(MEASURES)]
    for stack in chosen[0]:
        lines.append(f"| {stack} | " + " | ".join("{:.2f} ({:.2f})".format(*mean_ratio(chosen, stack, "kv", m)) for m in MEASURES) + " |")
    return [*lines, ""]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", help="recorded traces, beside the made ones")
    parser.add_argument("--requests", type=int, default=6000, help="of each trace, the first")
    parser.add_argument("--workers", default="4,8,16")
    parser.add_argument("--loads", default="low,middle,high,overload")
    parser.add_argument("--timings", default="polynomial,roofline")
    parser.add_argument("--only", default="", help="traces, instead of all: chats,agents")
    parser.add_argument("--quick", action="store_true", help="--requests 2500 --workers 4 --loads middle,high")
    parser.add_argument("--brief", action="store_true", help="without round-robin and least-loaded")
    parser.add_argument("--minutes", type=float, default=math.inf, help="report on the scenarios that were done by then")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.quick:
        options.workers, options.loads = "4", "middle,high"
        options.requests = min(options.requests, 2500)
    names = options.only.split(",") if options.only else [*options.traces, *KINDS]
    axes = product(names, options.timings.split(","), options.workers.split(","), options.loads.split(","))
    scenarios = [Scenario(trace, timing, int(workers), load) for trace, timing, workers, load in axes]
    fewest = min(s.workers for s in scenarios)
    scenarios = [s for s in scenarios if s.load != "overload" or s.workers == fewest]
    random.Random(SEED).shuffle(scenarios)  # whatever the time allows is then a fair sample
    results: Results = {s: {} for s in scenarios}
    wanted = [(s, name, stack) for s in scenarios for name, stack in (OVERLOAD if s.load == "overload" else {**STACKS, **IDEAL}).items()
              if not options.brief or name not in ("round-robin", "least-loaded")]
    started = time.monotonic()
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = {pool.submit(run, s, stack, options.requests, name in IDEAL): (s, name) for s, name, stack in wanted}
        for done, task in enumerate(as_completed(tasks), 1):
            if time.monotonic() - started > 60 * options.minutes:
                pool.shutdown(cancel_futures=True)
                break
            s, name = tasks[task]
            r = results[s][name] = task.result()
            said = f"{s}  {name}: TTFT {r['ttft_ms']['mean']:.0f}, e2e {r['e2e_ms']['mean']:.0f}"
            print(f"{done}/{len(tasks)} {time.monotonic() - started:.0f} s  {said}", flush=True)
    planned = {s: sum(s is other for other, _, _ in wanted) for s in scenarios}
    whole = sorted((s for s in scenarios if len(results[s]) == planned[s]), key=lambda s: (names.index(s.trace), s.timing, s.workers, LOADS[s.load]))
    ordered = {s: {name: results[s][name] for name in dict.fromkeys((*STACKS, *IDEAL, *OVERLOAD)) if name in results[s]} for s in whole}
    words = " ".join(Path(word).name for word in sys.argv[1:])
    about = f"{time.strftime('%Y-%m-%d')}, {options.requests} requests a trace, {len(whole)} of {len(scenarios)} scenarios"
    about += f"{', those that the time allowed, in random order' if len(whole) < len(scenarios) else ''}; `python -m benchmarks.quality {words}`."
    options.out.write_text(page(ordered, about))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
