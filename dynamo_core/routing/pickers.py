"""The built-in pickers: from totals to one row. All chance comes from the dice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Dice, Fleet


def best(totals: Sequence[float], dice: Dice) -> int:
    """The row of the highest total; among equals, one by the dice."""
    top = max(totals)
    if totals.count(top) == 1:
        return totals.index(top)
    rows = [row for row, total in enumerate(totals) if total == top]
    return rows[dice.below(len(rows))]


@attrs.frozen
class Best:
    """The highest total; ties by the dice."""

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        return best(totals, dice)


@attrs.frozen
class Softmax:
    """By chance, weighted by total.

    Totals are first scaled by their range, so that one temperature means the same for every stack: at 1 the best worker is
    chosen e times as often as the worst, and at 0 it is always chosen.
    """

    temperature: float = attrs.field(default=0.0, validator=v.ge(0))

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        top = max(totals)
        scale = (top - min(totals)) * self.temperature
        if self.temperature == 0 or not math.isfinite(scale):
            return best(totals, dice)
        if scale == 0:
            return dice.below(len(totals))
        weights = [math.exp((total - top) / scale) for total in totals]
        point = dice.uniform() * sum(weights)
        for row, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return row
        return totals.index(top)


@attrs.frozen
class Uniform:
    """By chance, all alike."""

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        return dice.below(len(totals))


@attrs.frozen
class PowerOfTwo:
    """The better of two different workers by chance. Needs no more than that to keep load even, and herds less than `best`."""

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        if len(totals) == 1:
            return 0
        first = dice.below(len(totals))
        second = dice.below(len(totals) - 1)
        second += second >= first
        return second if totals[second] > totals[first] else first
