"""Pictures of a replay: a few lines for the terminal, and a PNG where matplotlib is installed (`dynamo-sim[plot]`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_core.errors import ConfigError, Problem
from dynamo_sim.replay.engine import bucket_ms
from dynamo_sim.replay.simulate import Outcome

_SHADES = " ▁▂▃▄▅▆▇█"


def lines(outcomes: Mapping[str, Outcome], width: int = 60) -> list[str]:
    """Time to first token and end-to-end time as histograms, a line for each stack, on one logarithmic axis."""
    out: list[str] = []
    margin = max(map(len, outcomes), default=0)
    for title, values in (("time to first token", {n: o.first - o.arrived for n, o in outcomes.items()}),
                          ("end to end", {n: o.done - o.arrived for n, o in outcomes.items()})):
        values = {name: column[~np.isnan(column)] for name, column in values.items()}
        everything = np.concatenate(list(values.values())) if values else np.empty(0)
        if not len(everything):
            continue
        low, high = np.percentile(everything, (0.5, 99.9))
        edges = np.geomspace(max(low, 1e-3), max(high, low * 1.01, 2e-3), width + 1)
        counts = {name: np.histogram(np.clip(column, edges[0], edges[-1]), edges)[0] for name, column in values.items()}
        top = max(int(count.max()) for count in counts.values()) or 1
        out.append(f"{title}, {_ms(edges[0])} to {_ms(edges[-1])}, logarithmic; + is the mean")
        for name, count in counts.items():
            cells = [_SHADES[-(-int(c) * (len(_SHADES) - 1) // top)] for c in count]
            cells[min(width - 1, max(0, int(np.searchsorted(edges, values[name].mean())) - 1))] = "+"
            out.append(f"{name:<{margin}} |{''.join(cells)}|")
    return out


def _ms(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def check_png(path: Path) -> None:
    """Find out before an hour of simulation that the picture cannot be drawn. :raises ConfigError: so it is."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(Problem("drawing needs matplotlib", f"--plot {path}", remedy="pip install 'dynamo-sim[plot]'"))
    if not path.parent.is_dir():
        raise ConfigError(Problem(f"there is no directory {path.parent}", f"--plot {path}"))
    if path.is_dir():
        raise ConfigError(Problem("this is a directory", f"--plot {path}", remedy=f"name a file: --plot {path / 'replay.png'}"))


def png(path: Path, title: str, outcomes: Mapping[str, Outcome]) -> None:
    """Distributions of TTFT, ITL and end-to-end time, and working time by worker, one colour for each stack."""
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (ttft, e2e), (itl, busy) = figure.subplots(2, 2)
    for name, o in outcomes.items():
        _cumulative(ttft, name, o.first - o.arrived)
        _cumulative(e2e, name, o.done - o.arrived)
        slots = sorted(o.itl)
        reached = np.cumsum([o.itl[slot] for slot in slots])
        if len(slots):
            itl.step([bucket_ms(slot) for slot in slots], reached / reached[-1], label=name)
        busy.plot(np.sort(o.busy)[::-1] / 1000.0, marker="." if len(o.busy) <= 64 else None, label=name)
    for axes, what in ((ttft, "time to first token (ms)"), (e2e, "end to end (ms)"), (itl, "time between tokens (ms)")):
        axes.set(xscale="log", xlabel=what, ylabel="share", ylim=(0, 1))
    busy.set(xlabel="worker, busiest first", ylabel="working time (s)", ylim=(0, None))
    for axes in (ttft, e2e, itl, busy):
        axes.grid(alpha=0.3)
    ttft.legend()
    figure.savefig(path, dpi=120, format="png")


def _cumulative(axes: Any, name: str, values: NDArray[np.float64]) -> None:
    ordered = np.sort(values[~np.isnan(values)])
    if len(ordered) > 2000:
        ordered = ordered[np.linspace(0, len(ordered) - 1, 2000).astype(int)]
    if len(ordered):
        axes.step(np.maximum(ordered, 1e-3), np.arange(1, len(ordered) + 1) / len(ordered), label=name)


__all__: Sequence[str] = ["check_png", "lines", "png"]
