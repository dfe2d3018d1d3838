"""One request in one pool: its token stream, and what is learned from it about the pool."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs

from dynamo_core.context import Context
from dynamo_core.types import Output, Request
from dynamo_global_router.pool import Look, Pool
from dynamo_global_router.rates import Workload

MIN_TOKENS = 8
"""An answer of fewer tokens says nothing of the time between them."""
PAUSE = 0.05
"""Seconds between two answers of one pool that are learned from: to count who is beside them costs as much as a decision."""


class Ride:
    """`begin`, then `read` until it returns nothing; `close` in any case."""

    def __init__(self, pool: Pool, look: Look, request: Request, context: Context, *, elsewhere: bool) -> None:
        """:param elsewhere: there is another pool to go to until the first output. :raises DynamoError: nobody can take it."""
        self.pool = pool
        self.stream = pool.stream(request, context)
        self.stream.elsewhere = elsewhere
        self.ttft_ms: float | None = None
        self.tokens = 0
        self._look = look
        self._prompt = len(request.token_ids)
        self._choices = request.sampling.n
        self._started = time.monotonic()
        self._first = self._last = 0.0
        self._ended = False
        self._cached_said = False

    async def begin(self) -> Sequence[Output]:
        """The first outputs. :raises DynamoError: nothing was generated yet."""
        await self.stream.start()
        outputs = await self._read()
        self._first = self._last = time.monotonic()
        if self.tokens and not self._moved:
            self.ttft_ms = 1000 * (self._first - self._started)
            if not self._look.queued:
                self.pool.speed.first_token(self._met(), self.ttft_ms)
        self.pool.served()
        return outputs

    async def read(self) -> Sequence[Output]:
        outputs = await self._read()
        if outputs:
            self._last = time.monotonic()
        return outputs

    async def _read(self) -> Sequence[Output]:
        outputs = await self.stream.read()
        if not outputs:
            self._ended = True
        for output in outputs:
            self.tokens += len(output.token_ids)
            if output.cached_tokens is not None:
                # Said once, by whoever read the prompt: in the pool that may be another worker than the one that generates.
                output.cached_tokens = None if self._cached_said else self.stream.cached_tokens
                self._cached_said = True
        return outputs

    @property
    def itl_ms(self) -> float | None:
        """On average, so far."""
        steps = self.tokens / self._choices - 1
        return 1000 * (self._last - self._first) / steps if self.tokens >= MIN_TOKENS * self._choices and self._last > self._first else None

    def close(self) -> None:
        """Stop what still goes on, and learn from what has ended."""
        if not self._ended:
            self.stream.cancel("the caller stopped reading")
            return
        self.pool.speed.answered(self.tokens)
        worker, itl = self._look.worker, self.itl_ms
        if itl is None or worker is None or self._moved or self._last - self.pool.learned_at < PAUSE:
            return
        self.pool.learned_at = self._last
        if (now := self.pool.sequences(worker)) is not None:
            self.pool.speed.between_tokens((self._look.load.sequences + now) / 2, itl)

    def _met(self) -> Workload:
        """What the request found at the worker, with the engine's own word on what was cached."""
        look, cached = self._look, self.stream.cached_tokens
        if cached is None or look.row.facts is None or not look.row.facts.uncached_tokens:
            return look.load
        return attrs.evolve(look.load, tokens=look.load.tokens - look.row.facts.uncached_tokens + max(1, self._prompt - cached))

    @property
    def _moved(self) -> bool:
        """Another worker went on, so that times are not those of one."""
        return len(self.stream.workers) > (2 if self._look.split else 1)
