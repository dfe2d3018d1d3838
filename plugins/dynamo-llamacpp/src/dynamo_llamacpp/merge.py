"""The choices of a request as one stream.

Each choice runs in a task of its own, so that it gives its slot back when it is done and not when its reader is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from dynamo_core.types import Output


async def merged(starts: Sequence[Callable[[], AsyncGenerator[Output, None]]]) -> AsyncGenerator[Output, None]:
    """Outputs as they come. The first error ends all streams; so does closing."""
    arrived: list[Output] = []
    change = asyncio.Event()

    async def pump(start: Callable[[], AsyncGenerator[Output, None]]) -> None:
        async with aclosing(start()) as outputs:
            async for output in outputs:
                arrived.append(output)
                change.set()

    tasks = [asyncio.create_task(pump(start)) for start in starts]
    for task in tasks:
        task.add_done_callback(lambda _: change.set())
    try:
        while True:
            await change.wait()
            change.clear()
            over = all(task.done() for task in tasks)
            outputs, arrived[:] = arrived[:], []
            for output in outputs:
                yield output
            for task in tasks:
                if task.done():
                    task.result()
            if over:
                return
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
