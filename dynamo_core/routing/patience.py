"""Policies that are too slow, time after time, are left out for a while: requests do not wait for them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs


@attrs.define(eq=False)
class Patience:
    """One for each router. Times are seconds."""

    budget: float = 0.01
    """What one policy may take in one decision."""
    strikes: int = 5
    """So many decisions over budget in a row, and it is left out ..."""
    pause: float = 10.0
    """... for so long; then it has another chance."""
    _strikes: dict[str, int] = attrs.field(factory=dict, init=False)
    _out: dict[str, tuple[float, float]] = attrs.field(factory=dict, init=False)
    """By policy: until when, and what it took last."""

    def note(self, spent: Mapping[str, float], now: float) -> None:
        """What each policy took in a decision."""
        for name, seconds in spent.items():
            if seconds <= self.budget:
                if self._strikes:
                    self._strikes.pop(name, None)
                continue
            count = self._strikes[name] = self._strikes.get(name, 0) + 1
            if count >= self.strikes:
                self._out[name] = (now + self.pause, seconds)
                # Its next chance is one decision long.
                self._strikes[name] = self.strikes - 1

    def left_out(self, now: float) -> dict[str, str]:
        """Policies that must be skipped now, each with the reason."""
        if not self._out:
            return {}
        self._out = {name: entry for name, entry in self._out.items() if entry[0] > now}
        return {
            name: f"too slow {self.strikes} times in a row, {1e3 * took:.1f} ms for a budget of {1e3 * self.budget:g} ms: left out for {until - now:.1f} s more"
            for name, (until, took) in self._out.items()
        }
