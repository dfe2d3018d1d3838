"""Ending tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

_PATIENCE = 3.0
"""Seconds after which a task that was told to end is told again."""


async def ended(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel the tasks and wait until they have ended; whatever they raised is dropped, and `None` is nobody.

    One cancellation may not be enough: up to Python 3.11, `asyncio.wait_for` swallows one that arrives together with the result that it waited for, and
    libraries are full of it. A task that loops would then go on for ever, and so would whoever waits for it.
    """
    waiting = {task for task in tasks if task is not None}
    every = waiting
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=_PATIENCE)
    for task in every:
        if not task.cancelled():
            task.exception()
