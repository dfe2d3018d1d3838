"""Launches, which block for minutes, and on several nodes until all are there."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def launched(launch: Callable[[], T], broken: asyncio.Future[None] | None = None) -> T:
    """Run a launch in a thread. When `broken` fails, or whoever waits is cancelled, it is broken off: by ending the processes that it waits for.

    Otherwise it would wait for other nodes for ever, and the process with it.
    """
    before = set(multiprocessing.active_children())
    launching = asyncio.create_task(asyncio.to_thread(launch), name="launch vLLM")
    try:
        while not launching.done():
            await asyncio.wait({launching} if broken is None or broken.done() else {launching, broken}, return_when=asyncio.FIRST_COMPLETED)
            if broken is not None and broken.done():
                broken.result()
        return launching.result()
    finally:
        while not launching.done():
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            await asyncio.wait((launching,), timeout=0.2)
