"""Pictures of a profile: `pip install dynamo-planner[plot]`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dynamo_core.errors import ConfigError, Problem
from dynamo_planner.performance.profile import Measured


def draw(measured: Measured, out: Path) -> None:
    """Points as measured, lines as the planner believes them. The format follows the file's extension. :raises ConfigError: matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(Problem("a plot needs matplotlib, which is not installed", remedy="pip install dynamo-planner[plot]")) from e
    points = measured.profile
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    longest = max(p.tokens for p in points.prefill)
    lengths = np.linspace(0, longest * 1.1, 200)
    left.plot(lengths, [measured.prefill(float(n)) * 1000 for n in lengths])
    left.plot([p.tokens for p in points.prefill], [p.seconds * 1000 for p in points.prefill], "o")
    left.set(title="Reading one prompt", xlabel="uncached tokens", ylabel="ms", ylim=(0, None))
    most = max(p.concurrency for p in points.decode)
    batch = np.linspace(1, most, 100)
    for context in sorted({p.context for p in points.decode}):
        (line,) = right.plot(batch, [measured.itl(context, float(n)) * 1000 for n in batch], label=f"{context:.0f} tokens")
        seen = [p for p in points.decode if p.context == context]
        right.plot([p.concurrency for p in seen], [p.itl * 1000 for p in seen], "o", color=line.get_color())
    right.set(title="Decoding together", xlabel="sequences", ylabel="ms between tokens", ylim=(0, None))
    right.legend(title="mean length")
    try:
        figure.savefig(out)
    except (OSError, ValueError) as e:
        raise ConfigError(Problem(f"the plot cannot be written: {e}", str(out))) from e
