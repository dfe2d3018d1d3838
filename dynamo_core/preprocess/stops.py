"""Stop strings in a text that arrives in pieces.

The rule, which does not depend on how the text was cut: the text ends at the first character that completes a stop string. When
that character completes several at once, the longest of them counts. So no more tokens are generated to find out
whether a longer stop string would have followed.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopScanner:
    """Feeds text through and withholds exactly what may yet become a stop string."""

    __slots__ = ("_held", "_inner", "_longest", "_prefixes", "_stops", "include")

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        """`include`: leave the stop string in the text."""
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._prefixes = frozenset(stop[:n] for stop in self._stops for n in range(1, len(stop)))
        self._inner = frozenset(char for stop in self._stops for char in stop[:-1])
        """The last character of any text that may yet become a stop string."""
        self._longest = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self.include = include

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown, and the stop string that ended it, if one did. Not to be called after that."""
        if not text:
            return "", None
        text = self._held + text
        end, found = len(text) + 1, None
        for stop in self._stops:  # the longest first, so that it wins where two end together
            start = text.find(stop, 0, end - 1)
            if start >= 0:
                end, found = start + len(stop), stop
        if found is not None:
            self._held = ""
            return text[: end if self.include else end - len(found)], found
        if text[-1] in self._inner:
            for length in range(min(self._longest, len(text)), 0, -1):
                if text[-length:] in self._prefixes:
                    self._held = text[-length:]
                    return text[:-length], None
        self._held = ""
        return text, None

    def flush(self) -> str:
        """What was withheld, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held
