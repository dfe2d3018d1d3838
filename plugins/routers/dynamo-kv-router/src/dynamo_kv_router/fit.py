"""What an engine's work costs, learned while it works: least squares that forget, with no negative prices and with limits on surprise."""

from __future__ import annotations

from collections.abc import Sequence


class Prices:
    """`y = prices . x`, each price at least 0. Starts from a guess whose *proportions* are kept until the data say otherwise.

    Errors count relative to the size of `y`, so that short work teaches as much as long work does.
    """

    def __init__(self, guess: Sequence[float], *, memory: float = 500.0, trust: float = 6.0, floor: float = 2.0) -> None:
        """:param memory: samples after which a sample counts for a third. :param trust: samples that the guess is worth.

        :param floor: of `y`, for relative errors.
        """
        self.guess = tuple(guess)
        self.values = tuple(guess)
        self.samples = 0
        self._keep = 1.0 - 1.0 / memory
        self._trust = trust
        self._floor = floor
        size = len(guess)
        self._xx = [[0.0] * size for _ in range(size)]
        self._xy = [0.0] * size
        self._seen = 0.0
        self._expected = 0.0
        self._typical = [0.0] * size

    def estimate(self, x: Sequence[float]) -> float:
        return sum(p * v for p, v in zip(self.values, x, strict=True))

    def learn(self, x: Sequence[float], y: float) -> None:
        """One sample. Far outliers are cut to five times what was expected once there is something to expect."""
        if y < 0:
            return
        if self.samples >= 30:
            y = min(y, 5.0 * self.estimate(x) + self._floor)
        weight = 1.0 / (self._floor + y) ** 2
        keep, size = self._keep, len(x)
        for i in range(size):
            row, xi = self._xx[i], x[i] * weight
            for j in range(size):
                row[j] = keep * row[j] + xi * x[j]
            self._xy[i] = keep * self._xy[i] + xi * y
            self._typical[i] = keep * self._typical[i] + xi * x[i]
        # The scale of the guess: what was seen over what the guess would have said, both relative.
        said = sum(g * v for g, v in zip(self.guess, x, strict=True))
        relative = 1.0 / (self._floor + y + said)
        self._seen = keep * self._seen + y * relative
        self._expected = keep * self._expected + said * relative
        self.samples += 1
        if self.samples in (1, 2, 4, 8) or self.samples % 16 == 0:
            self._solve()

    def _solve(self) -> None:
        size = len(self.guess)
        scale = self._seen / self._expected if self._expected > 0 else 1.0
        center = [scale * g for g in self.guess]
        share = self._trust / max(1.0, float(min(self.samples, 1.0 / (1.0 - self._keep))))
        ridge = [share * t + 1e-12 for t in self._typical]
        active = list(range(size))
        while active:
            a = [[self._xx[i][j] + (ridge[i] if i == j else 0.0) for j in active] for i in active]
            b = [self._xy[i] + ridge[i] * center[i] for i in active]
            found = _solved(a, b)
            worst = min(range(len(active)), key=lambda k: found[k])
            if found[worst] >= 0.0:
                values = [0.0] * size
                for i, value in zip(active, found, strict=True):
                    values[i] = value
                self.values = tuple(values)
                return
            del active[worst]


def _solved(a: list[list[float]], b: list[float]) -> list[float]:
    """Gaussian elimination of a small positive definite system."""
    size = len(b)
    rows = [[*row, value] for row, value in zip(a, b, strict=True)]
    for i in range(size):
        pivot = rows[i][i] or 1e-30
        for k in range(i + 1, size):
            factor = rows[k][i] / pivot
            if factor:
                rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / (rows[i][i] or 1e-30)
    return found
