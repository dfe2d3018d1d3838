"""The command `dynamo replay TRACE`."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import attrs
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dynamo_core.config import Router, load
from dynamo_core.config.load import load_with_plugins
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.plugins import Plugins
from dynamo_sim.replay import plot as pictures
from dynamo_sim.replay.report import Report, report, table
from dynamo_sim.replay.simulate import Options, Outcome, simulate
from dynamo_sim.replay.trace import BLOCK, Trace, read
from dynamo_sim.scheduler import Limits

_STACK = "A configuration file, or a policy: kv, kv:prefill_scale=16. Repeat it to compare."
_CLOSED = "Closed loop: so many requests are always in progress; arrival times are ignored."
_SHARED = "One cache for all workers, as large as theirs together: what better placing could bring at most."
HEARTBEAT = 10.0
"""Seconds between two lines about the progress when nobody sits at a terminal."""


def replay(
    trace: Annotated[Path, Parameter(name="TRACE", help="JSON lines: timestamp (ms), input_length, output_length, hash_ids.")],
    /,
    *,
    stack: Annotated[tuple[str, ...], Parameter(name="--stack", negative=(), help=_STACK)] = ("round-robin",),
    workers: Annotated[int, Parameter(name="--workers", help="Simulated workers.")] = 4,
    rate: Annotated[float, Parameter(name="--rate", help="Arrivals come so many times faster than in the trace.")] = 1.0,
    concurrency: Annotated[int | None, Parameter(name="--concurrency", show_default=False, help=_CLOSED)] = None,
    frontends: Annotated[int, Parameter(name="--frontends", help="Routers among which the requests are divided.")] = 1,
    share: Annotated[bool, Parameter(name="--share", help="Frontends tell each other what they book.")] = True,
    timing: Annotated[Literal["polynomial", "linear", "roofline"], Parameter(name="--timing", help="How long a step takes.")] = "polynomial",
    engine_speedup: Annotated[float, Parameter(name="--engine-speedup", help="Steps take so many times less.")] = 1.0,
    blocks: Annotated[int, Parameter(name="--blocks", help="KV blocks of a worker.")] = 16384,
    block_size: Annotated[int, Parameter(name="--block-size", help="Tokens in one.")] = 64,
    max_sequences: Annotated[int, Parameter(name="--max-sequences", help="Sequences that a worker runs at once.")] = 256,
    max_batched_tokens: Annotated[int, Parameter(name="--max-batched-tokens", help="Tokens that one step computes at most.")] = 8192,
    event_lag: Annotated[float, Parameter(name="--event-lag", help="Milliseconds until routers hear of what caches store and remove.")] = 0.0,
    trace_block_size: Annotated[int, Parameter(name="--trace-block-size", help="Tokens of one hash id.")] = BLOCK,
    limit: Annotated[int | None, Parameter(name="--limit", show_default=False, help="Only so many requests, the first.")] = None,
    shared_cache: Annotated[bool, Parameter(name="--shared-cache", negative=(), show_default=False, help=_SHARED)] = False,
    seed: Annotated[int, Parameter(name="--seed", help="Of ties and chance in the routers.")] = 0,
    plot: Annotated[Path | None, Parameter(name="--plot", show_default=False, help="Draw distributions into this PNG file.")] = None,
    json: Annotated[bool, Parameter(name="--json", negative=(), show_default=False, help="Print JSON for programs.")] = False,
) -> int:
    """Replay a request trace against simulated workers in virtual time, once for each stack, and compare."""
    if trace_block_size < 1 or block_size < 1 or trace_block_size % block_size:
        raise ConfigError(Problem(f"--block-size ({block_size}) must divide --trace-block-size ({trace_block_size})", "--block-size"))
    if plot is not None:
        pictures.check_png(plot)
    options = _options(
        lambda: Options(
            workers, Limits(total_blocks=blocks, block_size=block_size, max_sequences=max_sequences, max_batched_tokens=max_batched_tokens), timing,
            engine_speedup, rate, concurrency, frontends, share, event_lag, seed, shared_cache,
        )
    )
    if max_batched_tokens < max_sequences:
        raise ConfigError(Problem(f"--max-batched-tokens ({max_batched_tokens}) must be at least --max-sequences ({max_sequences})", "--max-batched-tokens"))
    chosen = {name: resolve(name) for name in dict.fromkeys(stack)}
    requests = read(trace, block=trace_block_size, limit=limit)
    outcomes: dict[str, Outcome] = {}
    for name, (router, plugins) in chosen.items():
        outcomes[name] = _watched(name, requests, router, plugins, options, quiet=json)
    reports = [report(name, requests, outcome) for name, outcome in outcomes.items()]
    title = f"{requests.name}: {len(requests)} requests, {workers} workers, " + (f"{concurrency} at once" if concurrency else f"rate {rate:g}") + f", {timing}"
    title += ", one cache for all" if shared_cache else ""
    if json:
        sys.stdout.write(jsonlib.dumps({"trace": str(trace), "options": attrs.asdict(options), "stacks": [r.to_dict() for r in reports]}, indent=2) + "\n")
    else:
        show(title, reports, outcomes)
    if plot is not None:
        pictures.png(plot, title, outcomes)
    return 1 if any(r.refused == r.requests for r in reports) else 0


def show(title: str, reports: list[Report], outcomes: dict[str, Outcome]) -> None:
    """Table and histograms, for people."""
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=190)
    console.print(table(reports, title))
    for line in pictures.lines(outcomes):
        console.print(line, highlight=False, markup=False)
    took = ", ".join(f"{name} {outcome.wall_s:.1f} s" for name, outcome in outcomes.items())
    console.print(f"took {took}", highlight=False)
    for r in reports:
        for part, count in r.faults.items():
            console.print(f"{r.stack}: {part} broke its contract {count} times and was left out where it did", style="red", highlight=False)


def resolve(stack: str) -> tuple[Router, Plugins]:
    """The `[router]` table of a file, or a policy by name with options: `kv:prefill_scale=16,temperature=0.1`.

    :raises ConfigError: there is no such file or policy, or its options are wrong.
    """
    if stack.endswith((".toml", ".yaml", ".yml")) or Path(stack).is_file():
        config, plugins = load_with_plugins(Path(stack))
        return config.router, plugins
    plugins = Plugins.load()
    name, _, options = stack.partition(":")
    entries = ", ".join([f'use = "{name}"', *filter(None, options.split(","))])
    return load(text=f"[router]\nuse = {{ {entries} }}\n", environ={}, plugins=plugins).router, plugins


def _options(make: Callable[[], Options]) -> Options:
    try:
        return make()
    except ValueError as e:
        raise ConfigError(Problem(str(e), "dynamo replay")) from e


def _watched(name: str, trace: Trace, router: Router, plugins: Plugins, options: Options, *, quiet: bool) -> Outcome:
    if quiet:
        return simulate(trace, router, plugins, options)
    console = Console(stderr=True)
    if not console.is_terminal:
        return simulate(trace, router, plugins, options, _heartbeat(name, len(trace)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[at]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=len(trace), at="")
        return simulate(trace, router, plugins, options, lambda ended, now: bar.update(task, completed=ended, at=f"virtual {now / 1000:.0f} s"))


def _heartbeat(name: str, total: int) -> Callable[[int, float], None]:
    said = time.monotonic()

    def say(ended: int, now: float) -> None:
        nonlocal said
        if time.monotonic() - said >= HEARTBEAT:
            said = time.monotonic()
            sys.stderr.write(f"{name}: {ended} of {total} requests, {now / 1000:.0f} s of virtual time\n")
            sys.stderr.flush()

    return say
