"""What has arrived for one subscriber: bounded, in order, with every loss accounted for."""

from __future__ import annotations

import asyncio
from collections import deque

import attrs

from dynamo_core.events.contract import Event, Gap, Left, Notice

_BREATH = 256
"""Notices after which a reader that never has to wait lets the others run."""


@attrs.frozen
class _UpTo:
    """The publisher says that its next event has this sequence number."""

    publisher: int
    topic: str
    sequence: int


class Inbox:
    """The reading half of every subscription; the plane calls `push`, `up_to`, `left` and `close` on the reader's event loop.

    There is one rule for losses of every kind, on the way and in here alike: the numbers are compared when an event is read, counting from 0
    for a publisher not seen before, and what is missing is announced by a `Gap`. What has been read already is not read twice.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: deque[Event | _UpTo | Left] = deque()
        self._kept: deque[Left] = deque()
        self._next: dict[int, int] = {}
        self._closed = False
        self._wake = asyncio.Event()
        self._streak = 0

    def push(self, event: Event) -> None:
        self._append(event)

    def up_to(self, publisher: int, topic: str, sequence: int) -> None:
        """Everything of this publisher before `sequence` has been pushed, or is lost."""
        self._append(_UpTo(publisher, topic, sequence))

    def left(self, publisher: int, topic: str) -> None:
        self._append(Left(publisher, topic))

    def close(self) -> None:
        """End the iteration now: what has not been read is dropped."""
        self._closed = True
        self._queue.clear()
        self._kept.clear()
        self._wake.set()

    def _append(self, entry: Event | _UpTo | Left) -> None:
        if self._closed:
            return
        if len(self._queue) >= self._limit:
            oldest = self._queue.popleft()
            if isinstance(oldest, Left):  # the one thing that no later number would tell; there is at most one for each publisher
                self._kept.append(oldest)
        self._queue.append(entry)
        self._wake.set()

    async def read(self) -> Notice | None:
        """The next notice; `None` once closed."""
        self._streak += 1
        if self._streak >= _BREATH:
            self._streak = 0
            await asyncio.sleep(0)
        while True:
            while self._kept or self._queue:
                if (notice := self._take()) is not None:
                    return notice
            if self._closed:
                return None
            self._wake.clear()
            self._streak = 0
            await self._wake.wait()

    def _take(self) -> Notice | None:
        if self._kept:
            left = self._kept.popleft()
            self._next.pop(left.publisher, None)
            return left
        entry = self._queue[0]
        expected = self._next.get(entry.publisher, 0)
        if isinstance(entry, Left):
            self._queue.popleft()
            self._next.pop(entry.publisher, None)
            return entry
        if entry.sequence > expected:  # the event stays in the queue until the reader has been told; it may be dropped there, which makes one more gap
            self._next[entry.publisher] = entry.sequence
            return Gap(entry.publisher, entry.topic, entry.sequence - expected)
        self._queue.popleft()
        if isinstance(entry, _UpTo) or entry.sequence < expected:
            return None
        self._next[entry.publisher] = expected + 1
        return entry
