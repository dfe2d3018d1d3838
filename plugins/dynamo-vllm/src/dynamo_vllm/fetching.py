"""Bounds the wait of a decode worker for KV blocks.

vLLM waits without end for blocks that a prefill engine, or the network before it, has stopped to send: neither an answer nor an error comes. A request
that is given up here leaves its blocks to vLLM, which frees them when the transfer has ended, so that nothing can write into what somebody else uses by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

ON_THEIR_WAY = "in_progress"
"""vLLM's name for requests whose blocks have been asked for and are not there."""


class NothingComes(Exception):
    """The blocks of a request do not come."""


class Fetches:
    """What is on its way to one engine. `record` is told vLLM's statistics after each step."""

    def __init__(self, seconds: float) -> None:
        """:param seconds: after which blocks are given up, when nothing at all has come from the engine that has them."""
        self._seconds = seconds
        self._fetching: dict[int, float] = {}
        """By rank, since when there is always something on its way."""
        self._arrived: dict[str, float] = {}
        """By the engine that had them, when blocks came last."""

    def record(self, rank: int, stats: Any) -> None:
        if not stats.num_kv_fetch_reqs_by_stage.get(ON_THEIR_WAY):
            self._fetching.pop(rank, None)
        elif rank not in self._fetching:
            self._fetching[rank] = asyncio.get_running_loop().time()

    async def first(self, steps: AsyncIterator[Any], transfer: Mapping[str, Any]) -> Any:
        """The first step of a request whose blocks are elsewhere; `None` if there is none. :raises NothingComes: not within the time."""
        loop = asyncio.get_running_loop()
        peer = str(transfer.get("remote_engine_id"))
        begun = loop.time()
        limit = asyncio.timeout(None)
        try:
            async with limit:

                def look() -> None:
                    nonlocal timer
                    if (due := self._due(peer, begun)) <= loop.time():
                        limit.reschedule(due)
                    else:
                        timer = loop.call_at(due, look)

                timer = loop.call_at(begun + self._seconds, look)
                try:
                    step = await anext(steps, None)
                finally:
                    timer.cancel()
        except TimeoutError as e:
            if not limit.expired():
                raise
            raise NothingComes(f"nothing has come from it for {self._seconds:g} s") from e
        now = loop.time()
        if peer not in self._arrived:  # what is longer ago than the time says nothing any more
            self._arrived = {engine: when for engine, when in self._arrived.items() if when + self._seconds > now}
        self._arrived[peer] = now
        return step

    def _due(self, peer: str, begun: float) -> float:
        """When to give up, as things are. A request that only waits for its turn is not given up: nothing is on its way then."""
        fetching = min(self._fetching.values(), default=asyncio.get_running_loop().time())
        return max(begun, self._arrived.get(peer, 0.0), fetching) + self._seconds
