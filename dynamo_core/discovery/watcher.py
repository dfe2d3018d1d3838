"""The mailbox between a store and one watcher: the present first, then changes, never more than a bounded number."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from dynamo_core.discovery.contract import Change, Delete, Put, Resync, Synced

LIMIT = 4096
"""Changes that wait for one watcher; past that they are dropped and the present is sent anew."""


class Watcher:
    """What `Discovery.watch` hands out. The store calls `start` once it knows the present, then `push` for each change.

    A watcher that falls behind costs no more than its limit: what waits is dropped, and the next read sees `Resync` and
    the present as it is at that moment. Reading and pushing happen on one event loop.
    """

    def __init__(self, prefix: str, present: Callable[[], Iterable[Put]], limit: int = LIMIT) -> None:
        self.prefix = prefix
        self._present = present
        self._limit = limit
        self._snapshot: deque[Change] = deque()
        self._pending: deque[Change] = deque()
        self._started = False
        self._behind = False
        self._closed = False
        self._wake = asyncio.Event()

    def start(self) -> None:
        """The present is known: deliver it. Later calls do nothing."""
        if not self._started:
            self._started = True
            self._snapshot.extend(self._now())
            self._wake.set()

    def push(self, change: Put | Delete) -> None:
        if not self._started or self._behind or not change.key.startswith(self.prefix):
            return
        if len(self._pending) < self._limit:
            self._pending.append(change)
        else:
            self._snapshot.clear()
            self._pending.clear()
            self._behind = True
        self._wake.set()

    def close(self) -> None:
        """End the iteration after what has arrived."""
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> Change:
        while True:
            if self._behind:
                self._behind = False
                self._snapshot.append(Resync())
                self._snapshot.extend(self._now())
            if self._snapshot:
                return self._snapshot.popleft()
            if self._pending:
                return self._pending.popleft()
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()

    def _now(self) -> Iterable[Change]:
        yield from (put for put in self._present() if put.key.startswith(self.prefix))
        yield Synced()
