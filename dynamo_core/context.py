"""The one object that follows a request everywhere, the engine included."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Context:
    """Identity, deadline and cancellation of one request.

    Cancelling it anywhere stops the work everywhere: each stage that holds work registers itself with
    `on_cancel`, and callbacks run once, at once, in the order in which they were registered.
    """

    __slots__ = ("_callbacks", "cancel_reason", "deadline", "id", "priority", "session", "tenant", "traceparent")

    def __init__(self, id: str, *, deadline: float | None = None, priority: int = 0, session: str | None = None,
                 tenant: str | None = None, traceparent: str | None = None) -> None:
        self.id = id
        self.deadline = deadline
        """In `time.monotonic()` seconds of this process; on the wire it travels as what is left."""
        self.priority = priority
        self.session = session
        self.tenant = tenant
        self.traceparent = traceparent
        """W3C trace context, as a header value."""
        self.cancel_reason: str | None = None
        self._callbacks: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self.cancel_reason is not None

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop the work. Safe to call twice: the first reason stays."""
        if self.cancel_reason is None:
            self.cancel_reason = reason
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when the request is cancelled (now, if it already is). Returns what unregisters it."""
        if self.cancelled:
            callback()
            return lambda: None
        self._callbacks.append(callback)

        def forget() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return forget

    def fork(self) -> Context:
        """For one of several generations of the same request: cancelled with this one, with a place of its own in the trace."""
        branch = Context(self.id, deadline=self.deadline, priority=self.priority, session=self.session, tenant=self.tenant, traceparent=self.traceparent)
        self.on_cancel(lambda: branch.cancel(self.cancel_reason or "cancelled"))
        return branch

    async def wait_cancelled(self) -> str:
        """Return the reason once the request is cancelled."""
        done = asyncio.Event()
        forget = self.on_cancel(done.set)
        try:
            await done.wait()
        finally:
            forget()
        return self.cancel_reason or "cancelled"

    def remaining(self) -> float | None:
        """Seconds until the deadline (never negative), or `None` without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
