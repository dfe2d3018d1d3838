"""Tasks end when they are told to, even those that miss it the first time."""

from __future__ import annotations

import asyncio

from dynamo_core import ending
from dynamo_core.ending import ended


async def test_a_task_that_swallows_a_cancellation_is_told_again(monkeypatch):
    monkeypatch.setattr(ending, "_PATIENCE", 0.01)
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed == 3:
                    raise
                swallowed += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await ended(task)
    assert swallowed == 3
    assert task.cancelled()


async def test_nobody_and_tasks_that_failed_or_ended_before_are_no_trouble():
    async def fails() -> None:
        raise ValueError("no")

    failed, done = asyncio.create_task(fails()), asyncio.create_task(asyncio.sleep(0))
    await asyncio.wait([failed, done])
    await ended(None, failed, done)
    await ended()
