"""Measured points as monotone functions: a longer prompt never reads faster, a fuller batch never answers faster.

Measurements are noisy, and a planner that believed noise would find that more load needs fewer workers. So the points are made monotone
before anything is interpolated between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from dynamo_planner.contract import Floats


class Curve:
    """y over x, from points. Between them a smooth monotone curve, beyond them a straight line."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """:raises ValueError: there are no points."""
        xs, ys = _means(points)
        self.x, self.y = xs, np.asarray(isotonic_regression(ys).x, dtype=np.float64)
        self._inside = PchipInterpolator(self.x, self.y) if xs.size > 1 else None
        slopes = np.diff(self.y) / np.diff(self.x)
        self._before, self._after = (float(slopes[0]), float(slopes[-1])) if slopes.size else (0.0, 0.0)

    def __call__(self, x: float) -> float:
        if x <= self.x[0]:
            return max(0.0, float(self.y[0] - self._before * (self.x[0] - x)))
        if x >= self.x[-1]:
            return float(self.y[-1] + self._after * (x - self.x[-1]))
        assert self._inside is not None
        return float(self._inside(x))


class Surface:
    """z over x and y, from points; never falling in either. Bilinear inside the points, constant below them, a straight line above."""

    def __init__(self, points: Iterable[tuple[float, float, float]]) -> None:
        """:raises ValueError: there are no points."""
        rows: dict[float, list[tuple[float, float]]] = {}
        for x, y, z in points:
            rows.setdefault(x, []).append((y, z))
        if not rows:
            raise ValueError("there are no points")
        self.x = np.array(sorted(rows))
        self.y = np.array(sorted({y for row in rows.values() for y, _ in row}))
        grid = np.array([[Curve(rows[x])(y) for y in self.y] for x in self.x])
        from_below = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
        from_above = np.minimum.accumulate(np.minimum.accumulate(grid[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
        self.z = (from_below + from_above) / 2  # both never fall, so neither does their mean, and it takes noise from both sides
        self._beyond_x = _steepest(self.x, self.z)
        self._beyond_y = _steepest(self.y, self.z.T)
        self._xs, self._ys, self._rows = self.x.tolist(), self.y.tolist(), self.z.tolist()  # plain floats: a search asks a thousand times a decision

    def __call__(self, x: float, y: float) -> float:
        i, u = _place(self._xs, x)
        j, v = _place(self._ys, y)
        one, other = self._rows[i], self._rows[min(i + 1, len(self._rows) - 1)]
        k = min(j + 1, len(one) - 1)
        inside = (1 - u) * ((1 - v) * one[j] + v * one[k]) + u * ((1 - v) * other[j] + v * other[k])
        return inside + self._beyond_x * max(0.0, x - self._xs[-1]) + self._beyond_y * max(0.0, y - self._ys[-1])


def _means(points: Iterable[tuple[float, float]]) -> tuple[Floats, Floats]:
    """One mean for each x, sorted."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(float(x), []).append(float(y))
    if not found:
        raise ValueError("there are no points")
    xs = sorted(found)
    return np.array(xs), np.array([float(np.mean(found[x])) for x in xs])


def _place(axis: Sequence[float], value: float) -> tuple[int, float]:
    """The interval of an axis that a value falls into, and how far into it; the nearest end for values outside."""
    i = min(max(bisect_right(axis, value) - 1, 0), max(0, len(axis) - 2))
    if len(axis) == 1:
        return 0, 0.0
    return i, min(1.0, max(0.0, (value - axis[i]) / (axis[i + 1] - axis[i])))


def _steepest(axis: Floats, z: Floats) -> float:
    """The greatest slope of the last stretch."""
    return float(np.max((z[-1] - z[-2]) / (axis[-1] - axis[-2]))) if axis.size > 1 else 0.0
