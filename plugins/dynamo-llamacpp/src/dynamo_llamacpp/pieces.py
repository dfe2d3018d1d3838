"""Finds the tokens behind text when llama.cpp shows only the text: those within one unfinished character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Pieces:
    """The bytes of every token."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(pieces):
            if piece:
                self._ids.setdefault(piece, token)
        self._longest = max(map(len, self._ids), default=0)
        self.whole = next((token for piece, token in self._ids.items() if not unfinished(piece)), 0)
        """Some token that is text by itself."""

    def within(self, text: str, hidden: int, last: int, *, unique: bool) -> list[int] | None:
        """The `hidden` tokens that come before `last` in `text`, each of which left a character unfinished.

        `None` when there are none, or more than one answer and `unique`.
        """
        whole, piece = text.encode("utf-8", "surrogatepass"), self._pieces[last]
        if not whole.endswith(piece):
            return None
        found = self._cuts(whole[: len(whole) - len(piece)], b"", hidden)
        first = next(found, None)
        return None if first is None or (unique and next(found, None) is not None) else first

    def _cuts(self, rest: bytes, before: bytes, count: int) -> Iterator[list[int]]:
        if not count:
            if not rest:
                yield []
            return
        for size in range(min(self._longest, len(rest)), 0, -1):
            token = self._ids.get(rest[:size])
            if token is not None and unfinished(before + rest[:size]):
                for more in self._cuts(rest[size:], before + rest[:size], count - 1):
                    yield [token, *more]


def unfinished(text: bytes) -> bool:
    """Whether the last character lacks bytes (by the same rule as llama.cpp: only the lead byte counts)."""
    for back in range(1, min(4, len(text)) + 1):
        lead = text[-back]
        if (lead & 0xE0 == 0xC0 and back < 2) or (lead & 0xF0 == 0xE0 and back < 3) or (lead & 0xF8 == 0xF0 and back < 4):
            return True
    return False
