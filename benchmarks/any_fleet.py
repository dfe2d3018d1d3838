"""Policies on fleets and traces drawn by chance: where the default is worse than another, this finds it. In virtual time.

    python -m benchmarks.any_fleet                                    # 80 draws, three stacks: minutes on two cores
    python -m benchmarks.any_fleet --draws 100:180                    # other draws
    python -m benchmarks.any_fleet --stack kv-plus --stack kv-plus:slowdown_weight=0.2

A draw is one or two kinds of traffic with lengths over two orders of magnitude, steady or in bursts, before 2 to 32 workers with caches, batches, timings and loads of
all sizes, and one frontend or two. Draws in which the first stack is overloaded, or any refuses requests, are left out and counted. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import attrs

from benchmarks.quality import rate_for, resolve_any
from dynamo_sim.replay.report import Report, report
from dynamo_sim.replay.simulate import Options, simulate
from dynamo_sim.replay.synthetic import KINDS
from dynamo_sim.replay.trace import Line, Trace, build
from dynamo_sim.scheduler import Limits

TUNED = "kv:prefill_scale=16"
OVERLOADED = 10_000.0
"""Milliseconds of mean TTFT with the first stack."""
LONGEST = 60_000
"""Tokens of a request, answer included; more fits no cache that is drawn."""
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "prefixes": {"prompts": (1, 400), "prefix": (600, 30_000), "own": (50, 6_000), "output": (5, 1_500)},
    "chats": {"turns": (1.5, 25), "first": (100, 12_000), "more": (50, 4_000), "output": (10, 1_500)},
    "agents": {"kinds": (1, 60), "steps": (2, 40), "head": (600, 25_000), "result": (50, 5_000), "output": (10, 800)},
}
"""Of the options of each kind of traffic."""
MEASURES: dict[str, Callable[[Report], float]] = {
    "TTFT": lambda r: r.ttft_ms.mean, "TTFT p99": lambda r: r.ttft_ms.p99, "ITL": lambda r: r.itl_ms.mean, "e2e": lambda r: r.e2e_ms.mean,
    "hit rate": lambda r: max(r.hit_rate, 1e-3),
}


@attrs.frozen
class Draw:
    about: str
    trace: Trace
    options: Options


def draw(number: int, requests: int) -> Draw:
    rng = random.Random(number)
    kinds = rng.choices(sorted(KINDS), k=2 if rng.random() < 0.3 else 1)
    lines: list[Line] = []
    abouts: list[str] = []
    for i, kind in enumerate(kinds):
        about, trace = traffic(kind, rng, requests // len(kinds), number * 2 + i)
        abouts.append(about)
        lines.extend(lines_of(trace, i))
    about = " + ".join(abouts)
    if rng.random() < 0.4:
        period, share = spread(rng, 5e3, 120e3), rng.uniform(0.1, 0.6)
        in_bursts(lines, period, share)
        about += f", all in {share:.0%} of each {period / 1000:.0f} s"
    limits = Limits(total_blocks=int(spread(rng, 1200, 16384)), max_sequences=rng.choice((64, 128, 256)), max_batched_tokens=rng.choice((2048, 8192)))
    timing = rng.choice(("polynomial", "roofline", "linear"))
    options = Options(workers=rng.choice((2, 3, 4, 6, 8, 12, 16, 24, 32)), limits=limits, timing=timing, frontends=rng.choice((1, 1, 2)))
    load = rng.choice((0.08, 0.15, 0.25, 0.35, 0.45))
    about += f"; {options.workers} workers, {limits.total_blocks} blocks, {timing}, load {load}"
    trace = build(lines, name=about)
    return Draw(about, trace, attrs.evolve(options, rate=rate_for(trace, options, load)))


def spread(rng: random.Random, low: float, high: float) -> float:
    """Each order of magnitude is as likely as another."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def traffic(kind: str, rng: random.Random, requests: int, seed: int) -> tuple[str, Trace]:
    chosen: dict[str, Any] = {name: spread(rng, low, high) for name, (low, high) in RANGES[kind].items()}
    for name in ("prompts", "kinds"):
        if name in chosen:
            chosen[name] = int(chosen[name])
    about = ", ".join(f"{name} {value:.0f}" for name, value in chosen.items())
    return f"{kind} ({about})", KINDS[kind](requests, seed=seed, **chosen)


def lines_of(trace: Trace, part: int) -> Iterator[Line]:
    """The requests that fit every cache, under names of their own."""
    for i in range(len(trace)):
        prompt, output = int(trace.prompt[i]), int(trace.output[i])
        if prompt + output >= LONGEST:
            continue  # later turns of it are longer still
        ids = (trace.ids[trace.start[i] : trace.start[i + 1]] + part * 2**40).tolist()
        later = trace.after is not None and trace.after[i] >= 0
        session = None if trace.session is None or trace.session[i] < 0 else f"{part}-{trace.session[i]}"
        at = float(trace.arrival[i])
        yield Line(prompt, output, ids, None if later else at, session, at if later else None)


def in_bursts(lines: Sequence[Line], period: float, share: float) -> None:
    """Arrivals of each period (ms) come in its first `share`; later turns wait for the turn before them as ever."""
    for line in lines:
        if line.timestamp is not None:
            line.timestamp = line.timestamp // period * period + line.timestamp % period * share


def replayed(number: int, requests: int, stack: str) -> tuple[str, Report]:
    what = draw(number, requests)
    router, plugins = resolve_any(stack)
    return what.about, report(stack, what.trace, simulate(what.trace, router, plugins, what.options))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", default="0:80", help="numbers, from : to")
    parser.add_argument("--requests", type=int, default=1500, help="of a draw")
    parser.add_argument("--stack", action="append", help="what is compared with the first")
    parser.add_argument("--against", default=TUNED)
    parser.add_argument("--worst", type=int, default=5, help="draws to describe for each stack")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    first, last = (int(number) for number in options.draws.split(":"))
    stacks = [options.against, *(options.stack or ("kv", "kv-plus"))]
    results: dict[int, dict[str, Report]] = {}
    abouts: dict[int, str] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        tasks = {(number, stack): pool.submit(replayed, number, options.requests, stack) for number in range(first, last) for stack in stacks}
        for (number, stack), task in tasks.items():
            abouts[number], results.setdefault(number, {})[stack] = task.result()
    calm = {n: r for n, r in results.items() if r[stacks[0]].ttft_ms.mean < OVERLOADED and not any(each.refused for each in r.values())}
    if not calm:
        print("every draw is overloaded")
        return 1
    print(f"{len(calm)} of {len(results)} draws of {options.requests} requests; the others are overloaded. Ratio to {stacks[0]}: geometric mean, and the greatest")
    print(f"{'':32}" + "".join(f"{name:>16}" for name in MEASURES) + "   more than 5 % worse: TTFT, its p99, e2e")
    for stack in stacks[1:]:
        ratios = {n: [measure(r[stack]) / measure(r[stacks[0]]) for measure in MEASURES.values()] for n, r in calm.items()}
        columns = list(zip(*ratios.values(), strict=True))
        cells = "".join(f"{math.exp(statistics.fmean(map(math.log, column))):9.3f} {max(column):6.2f}" for column in columns)
        worse = ", ".join(str(sum(ratio > 1.05 for ratio in columns[i])) for i in (0, 1, 3))
        print(f"{stack:32}{cells}   {worse}")
        for number in sorted(ratios, key=lambda n: -ratios[n][0])[: options.worst]:
            print(f"    {number}: TTFT {ratios[number][0]:.2f}, p99 {ratios[number][1]:.2f}, e2e {ratios[number][3]:.2f}: {abouts[number]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
