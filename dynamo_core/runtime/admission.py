"""Requests in progress on this worker: how many, since when nothing moved, and when they are all done."""

from __future__ import annotations

import asyncio

from dynamo_core.context import Context
from dynamo_core.errors import StreamError, WorkerDraining, WorkerOverloaded


class Admission:
    """Counts requests in, refuses one too many, and can end them all with an error."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.refused = 0
        self.moved = False
        """Set by every output; the canary clears it to see whether anything moves."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.broken: StreamError | None = None
        """What `break_all` ended the requests in progress with."""
        self._serving: dict[Context, asyncio.Task[object] | None] = {}
        self._closed: str | None = None

    def enter(self, context: Context) -> None:
        """:raises WorkerOverloaded: at the limit. :raises WorkerDraining: this worker takes nothing more."""
        if self._closed is not None:
            raise WorkerDraining(self._closed)
        if self.in_flight >= self.limit:
            self.refused += 1
            raise WorkerOverloaded(f"this worker has {self.in_flight} requests in progress, its limit (workers.max_requests)")
        self.in_flight += 1
        self._serving[context] = asyncio.current_task()
        self._idle.clear()

    def leave(self, context: Context) -> None:
        self.in_flight -= 1
        self._serving.pop(context, None)
        if not self.in_flight:
            self._idle.set()

    def close(self, why: str) -> None:
        """Refuse everything from now on; what is in progress goes on."""
        self._closed = why

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is in progress; false if something still is after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def break_all(self, error: StreamError) -> None:
        """End everything in progress with this error, wherever it waits; `broken` tells it from a cancellation by the caller."""
        self.broken = error
        for task in list(self._serving.values()):
            if task is not None:
                task.cancel()
