"""Who waits for KV blocks that do not come gives them up; who only waits for its turn does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from dynamo_vllm.fetching import ON_THEIR_WAY, Fetches, NothingComes

AT_P = {"remote_engine_id": "p"}


def stats(on_their_way: int) -> Any:
    return SimpleNamespace(num_kv_fetch_reqs_by_stage={ON_THEIR_WAY: on_their_way})


class Clock:
    """The running loop's, turned by hand."""

    def __init__(self) -> None:
        self._now = 1000.0
        asyncio.get_running_loop().time = lambda: self._now

    async def turn(self, seconds: float) -> None:
        await self._settle()
        self._now += seconds
        await self._settle()

    async def _settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def clock() -> Clock:
    return Clock()


class Steps:
    """Of one request; it begins when it is told to."""

    def __init__(self) -> None:
        self.begin = asyncio.Event()
        self.aborted = False

    async def run(self) -> AsyncGenerator[str, None]:
        try:
            await self.begin.wait()
            yield "first"
        except asyncio.CancelledError:
            self.aborted = True
            raise


async def given(fetches: Fetches, transfer: dict[str, str]) -> None:
    """Another request gets its blocks."""
    other = Steps()
    other.begin.set()
    assert await fetches.first(other.run(), transfer) == "first"


def waits(fetches: Fetches, steps: Steps) -> asyncio.Task[str]:
    return asyncio.create_task(fetches.first(steps.run(), AT_P))


async def test_blocks_that_do_not_come_are_given_up_and_the_request_is_aborted(clock: Clock) -> None:
    fetches, steps = Fetches(30.0), Steps()
    fetches.record(0, stats(1))
    waiting = waits(fetches, steps)
    await clock.turn(29.9)
    assert not waiting.done()
    await clock.turn(0.2)
    with pytest.raises(NothingComes, match="nothing has come from it for 30 s"):
        await waiting
    assert steps.aborted


async def test_a_request_that_waits_for_its_turn_is_not_given_up(clock: Clock) -> None:
    fetches, steps = Fetches(30.0), Steps()
    fetches.record(0, stats(1))
    waiting = waits(fetches, steps)
    await clock.turn(20)
    fetches.record(0, stats(0))
    for _ in range(9):
        await clock.turn(20)
    fetches.record(0, stats(1))
    await clock.turn(29)
    steps.begin.set()
    assert await waiting == "first"


async def test_a_request_is_not_given_up_while_others_are_given_what_the_same_engine_has(clock: Clock) -> None:
    fetches, steps = Fetches(30.0), Steps()
    fetches.record(0, stats(2))
    waiting = waits(fetches, steps)
    for _ in range(9):
        await clock.turn(20)
        await given(fetches, AT_P)
    steps.begin.set()
    assert await waiting == "first"


async def test_what_another_engine_gives_does_not_help(clock: Clock) -> None:
    fetches, steps = Fetches(30.0), Steps()
    fetches.record(0, stats(2))
    waiting = waits(fetches, steps)
    for _ in range(3):
        await given(fetches, {"remote_engine_id": "q"})
        await clock.turn(11)
    with pytest.raises(NothingComes):
        await waiting


async def test_a_caller_that_leaves_is_not_told_of_blocks() -> None:
    fetches, steps = Fetches(30.0), Steps()
    waiting = waits(fetches, steps)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert steps.aborted


async def test_an_end_without_a_step_is_told() -> None:
    async def nothing() -> AsyncGenerator[str, None]:
        for step in ():
            yield step

    assert await Fetches(30.0).first(nothing(), AT_P) is None
