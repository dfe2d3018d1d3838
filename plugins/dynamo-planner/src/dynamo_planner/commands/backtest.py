from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dynamo_core.cli.options import ConfigFile, Overrides
from dynamo_core.errors import ConfigError, Problem
from dynamo_planner.commands.journal import JournalFile, decisions


def backtest(
    file: ConfigFile = None, /, *,
    series: Annotated[Path | None, Parameter(help="A text file with one count for each interval, instead of the journal.", show_default=False)] = None,
    steps: Annotated[int, Parameter(help="Intervals ahead.")] = 2,
    every: Annotated[int, Parameter(help="Forecast at each so many-th point.")] = 1,
    journal: JournalFile = None, overrides: Overrides = (),
) -> int:
    """Replay every installed predictor on recorded load, the best first."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from dynamo_core.errors import PluginError
    from dynamo_core.plugins import Plugins
    from dynamo_planner.predict.backtest import backtest as replay

    if series is not None:
        counts = _read(series)
    else:
        kept, _ = decisions(file, overrides, journal)
        counts = [d.interval.rate * d.interval.seconds for d in kept if d.interval is not None]
    console, predictors = Console(), {}
    for name, component in Plugins.load().of_kind("predictor").items():
        try:
            predictors[name] = component.load()()
        except PluginError as e:
            console.print(f"left out: {e}", highlight=False)
    try:
        scores = replay(predictors, np.array(counts, dtype=np.float64), steps=max(1, steps), every=max(1, every), skip=min(60, len(counts) // 3))
    except ValueError as e:
        raise ConfigError(Problem(str(e), remedy="record for longer")) from None
    table = Table("predictor", "error", "too low by", "in the interval", "ms", title=f"{len(counts)} points, {steps} ahead")
    for score in scores:
        table.add_row(score.name, f"{score.error:.1%}", f"{score.under:.1%}", f"{score.covered:.0%}", f"{score.milliseconds:.1f}")
    console.print(table)
    return 0


def _read(path: Path) -> list[float]:
    counts: list[float] = []
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                try:
                    counts.append(float(line))
                except ValueError:
                    raise ConfigError(Problem(f"{line!r} is not a number", f"{path}:{number}")) from None
    except OSError as e:
        raise ConfigError(Problem(f"cannot be read: {e.strerror}", str(path))) from e
    return counts
