"""vLLM's own statistics as reports of load: at most ten a second for each rank, and neither a short burst nor its end is missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from dynamo_core.types import Load

INTERVAL = 0.1


class LoadReports:
    """`record` is called after each step, on the event loop."""

    def __init__(self, publish: Callable[[Load], None]) -> None:
        self.total_blocks = 0
        """Of one rank; nothing is reported before it is known."""
        self._publish = publish
        self._used: dict[int, int] = {}
        self._waiting: dict[int, list[Load]] = {}
        """By rank: what is to be told next and, if that was busy and it is over, the end of it."""
        self._timer: asyncio.TimerHandle | None = None
        self._told = 0.0
        self._closed = False

    def record(self, rank: int, stats: Any) -> None:
        if self._closed or not self.total_blocks:
            return
        waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        load = Load(stats.num_running_reqs, waiting, round(stats.kv_cache_usage * self.total_blocks), self.total_blocks, 0, rank)
        self._used[rank] = load.kv_used_blocks
        before = self._waiting.get(rank)
        self._waiting[rank] = [before[0], load] if before and _busy(before[0]) and not _busy(load) else [load]
        self._arm()

    @property
    def used_blocks(self) -> int:
        """Blocks in use by the last word of each rank."""
        return sum(self._used.values())

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._told + INTERVAL), self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._told = asyncio.get_running_loop().time()
        for rank, loads in list(self._waiting.items()):
            self._publish(loads.pop(0))
            if not loads:
                del self._waiting[rank]
        if self._waiting:
            self._arm()


def _busy(load: Load) -> bool:
    return bool(load.running or load.waiting)
