"""Lines over time as inline SVG, readable without scripts and in both colour schemes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

import attrs

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 900, 220, 56, 12, 24


@attrs.frozen
class Line:
    name: str
    points: Sequence[tuple[float, float | None]]
    """Time and value; None breaks the line."""
    colour: str
    steps: bool = False
    """The value holds until the next point."""


@attrs.frozen
class Band:
    """Between two lines, such as the interval of a forecast."""

    points: Sequence[tuple[float, float, float]]
    colour: str


def plot(title: str, unit: str, lines: Sequence[Line], band: Band | None = None, mark: tuple[str, float] | None = None) -> str:
    """:param mark: a horizontal line, such as a target."""
    times = [at for line in lines for at, _ in line.points]
    values = [value for line in lines for _, value in line.points if value is not None]
    values += [high for _, _, high in band.points] if band is not None else []
    values += [mark[1]] if mark is not None else []
    if not times or not values:
        return f"<figure><figcaption>{escape(title)}: nothing recorded</figcaption></figure>"
    start, span = min(times), max(max(times) - min(times), 1e-9)
    top = _nice(max(values))

    def x(at: float) -> str:
        return f"{LEFT + (at - start) / span * (WIDTH - LEFT - 8):.1f}"

    def y(value: float) -> str:
        return f"{TOP + (1 - min(value, top) / top) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for i in range(5):
        value = top * i / 4
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(value)}" y2="{y(value)}"/>'
                     f'<text x="{LEFT - 6}" y="{y(value)}" text-anchor="end" dy="0.3em">{value:g}</text>')
    for i in range(7):
        at = start + span * i / 6
        parts.append(f'<text x="{x(at)}" y="{HEIGHT - 6}" text-anchor="middle">{_time(at - start)}</text>')
    if band is not None and band.points:
        ring = [(at, high) for at, _, high in band.points] + [(at, low) for at, low, _ in reversed(band.points)]
        parts.append(f'<polygon fill="{band.colour}" opacity="0.2" points="{" ".join(f"{x(at)},{y(value)}" for at, value in ring)}"/>')
    if mark is not None:
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(mark[1])}" y2="{y(mark[1])}"/>'
                     f'<text x="{WIDTH - 10}" y="{y(mark[1])}" dy="-0.4em" text-anchor="end">{escape(mark[0])}</text>')
    for line in lines:
        parts += [f'<path fill="none" stroke="{line.colour}" stroke-width="1.5" d="{d}"/>' for d in _paths(line, x, y)]
    legend = " ".join(f'<span style="color:{line.colour}">&#9632; {escape(line.name)}</span>' for line in lines)
    return f"<figure><figcaption><b>{escape(title)}</b> ({escape(unit)}) {legend}</figcaption>{''.join(parts)}</svg></figure>"


def _paths(line: Line, x: Callable[[float], str], y: Callable[[float], str]) -> list[str]:
    paths: list[str] = []
    d, before = "", None
    for at, value in line.points:
        if value is None:
            paths, d, before = [*paths, d] if d else paths, "", None
            continue
        if not d:
            d = f"M{x(at)},{y(value)}"
        else:
            d += (f"H{x(at)}" if line.steps and before is not None else "") + f"L{x(at)},{y(value)}"
        before = value
    return [*paths, d] if d else paths


def _nice(value: float) -> float:
    """A round number at or above."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 4, 5, 8, 10, 20) if power * step >= value)


def _time(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
