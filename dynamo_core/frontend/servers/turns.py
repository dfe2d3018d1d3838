"""Bytes that leave at the end of a turn of the event loop, those of all connections one right after the other.

A step of an engine brings a token for many streams. Their bytes are made first and written then: a receiver, or a network card, that is awake
for the first is awake for all, and what one connection says in several pieces (a head and the first event) is one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary


class Turn:
    """What is to be done at the end of this turn."""

    _turns: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Turn]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._flushes: list[Callable[[], None]] = []

    @classmethod
    def here(cls) -> Turn:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if (turn := cls._turns.get(loop)) is None:
            turn = cls._turns[loop] = cls()
        return turn

    def add(self, flush: Callable[[], None]) -> None:
        if not self._flushes:
            asyncio.get_running_loop().call_soon(self._end)
        self._flushes.append(flush)

    def _end(self) -> None:
        flushes, self._flushes = self._flushes, []
        for flush in flushes:
            flush()
