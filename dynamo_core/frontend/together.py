"""Several generations read as one: a plain completion with several prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dynamo_core.pipeline.contract import Generation
from dynamo_core.types import Delta, LogprobText, Usage


class Together:
    """A `Generation` over others. The choices of the k-th prompt have the indexes k * n to k * n + n - 1, as OpenAI counts.

    Each part has one read in flight, so a slow client slows all of them down and nothing piles up here.
    """

    def __init__(self, parts: Sequence[Generation], n: int) -> None:
        self._parts = list(parts)
        self._n = n
        self._reads: dict[asyncio.Task[Sequence[Delta]], int] = {}
        self._begun = False
        self.prompt_logprobs: Sequence[LogprobText | None] | None = None
        self._tally()

    async def read(self) -> Sequence[Delta]:
        """:raises DynamoError: one part failed; the caller cancels the rest."""
        if not self._begun:
            self._begun = True
            for position in range(len(self._parts)):
                self._begin(position)
        while self._reads:
            done, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
            merged: list[Delta] = []
            for task in done:
                position = self._reads.pop(task)
                if deltas := task.result():
                    for delta in deltas:
                        delta.index += position * self._n
                    merged += deltas
                    self._begin(position)
            if merged:
                self._tally()
                return merged
        self._tally()
        return ()

    def cancel(self, reason: str = "client disconnected") -> None:
        for task in self._reads:
            task.cancel()
        self._reads.clear()
        for part in self._parts:
            part.cancel(reason)

    def _tally(self) -> None:
        every = [part.usage for part in self._parts]
        self.usage = Usage(sum(u.prompt_tokens for u in every), sum(u.completion_tokens for u in every), sum(u.cached_tokens for u in every))
        self.decisions = [decision for part in self._parts for decision in part.decisions]
        self.workers = [worker for part in self._parts for worker in part.workers]

    def _begin(self, position: int) -> None:
        self._reads[asyncio.ensure_future(self._parts[position].read())] = position
