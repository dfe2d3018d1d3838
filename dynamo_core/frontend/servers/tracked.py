"""Requests in progress, as every server needs them to drain: wait for them for a while, then cut what is left."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("dynamo.http")


class Tracked:
    """An ASGI application around another one that knows the tasks of its requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tasks: set[asyncio.Task[Any]] = set()
        self._cut: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        self._tasks.add(task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            # Ending quietly makes the server close the connection in the middle of the answer, which is what the client must see.
        finally:
            self._tasks.discard(task)
            self._cut.discard(task)

    async def drain(self, timeout: float) -> None:
        """Return when nothing is in progress; what still is after `timeout` seconds is cancelled."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(set(self._tasks), timeout=timeout)
        if late:
            log.warning("requests were cut because they outlasted the drain timeout", extra={"requests": len(late), "seconds": timeout})
            self._cut |= late
            for task in late:
                task.cancel()
            await asyncio.wait(late, timeout=1.0)
