"""When something that has ended is started again: soon after a good while, then with growing pauses."""

from __future__ import annotations

STABLE = 30.0
"""Seconds after which it counts as well, and its next crash is the first of a row."""
LONGEST = 15.0
"""Seconds between two attempts, at most."""
_DOUBLINGS = 5


class Crashes:
    """Crashes in a row, none of them after a stable time."""

    count = 0

    def pause(self, lived: float) -> float:
        """One more, after `lived` seconds. Returns the seconds until the next start."""
        self.count = 1 if lived > STABLE else self.count + 1
        return min(0.5 * 2 ** min(self.count - 1, _DOUBLINGS), LONGEST)
