"""Wrappers around every request: guardrails, audit, tenancy, shadowing (kind `preprocessor`, configured by `around`).

    class Audit:
        async def around_request(self, request, context, next):
            async for deltas in next(request):
                yield deltas

A wrapper sees tokens and text, may refuse (raise a `RequestError`), change the request, or change what comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from dynamo_core.context import Context
from dynamo_core.pipeline.contract import Generation
from dynamo_core.types import Delta, LogprobText, Request, Usage

Handler = Callable[[Request], AsyncIterator[Sequence[Delta]]]


@runtime_checkable
class Around(Protocol):
    def around_request(self, request: Request, context: Context, next: Handler) -> AsyncIterator[Sequence[Delta]]:
        """An async generator. Each item is what one read brought: at least one delta, at most one for each choice.

        Called: once per generation, before routing. `next` must be called at most once. Every choice must still end with a finish reason.
        """
        ...


class Surrounded:
    """A `Generation` seen through wrappers. The inner one starts at the first read, when a wrapper asks for it."""

    def __init__(self, around: Sequence[Around], request: Request, context: Context, start: Callable[[Request], Awaitable[Generation]]) -> None:
        self._inner: Generation | None = None
        self._start = start
        self._prompt_tokens = len(request.token_ids)
        handler: Handler = self._innermost
        for wrapper in reversed(around):
            handler = _layer(wrapper, context, handler)
        self._deltas = handler(request)

    async def _innermost(self, request: Request) -> AsyncIterator[Sequence[Delta]]:
        self._inner = generation = await self._start(request)
        while deltas := await generation.read():
            yield deltas

    @property
    def usage(self) -> Usage:
        return self._inner.usage if self._inner is not None else Usage(prompt_tokens=self._prompt_tokens)

    @property
    def decisions(self) -> Sequence[str]:
        return self._inner.decisions if self._inner is not None else ()

    @property
    def workers(self) -> Sequence[str]:
        return self._inner.workers if self._inner is not None else ()

    @property
    def prompt_logprobs(self) -> Sequence[LogprobText | None] | None:
        return self._inner.prompt_logprobs if self._inner is not None else None

    async def read(self) -> Sequence[Delta]:
        async for deltas in self._deltas:
            return deltas
        return ()

    def cancel(self, reason: str = "client disconnected") -> None:
        if self._inner is not None:
            self._inner.cancel(reason)
        closing = asyncio.ensure_future(_close(self._deltas))
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


def _layer(wrapper: Around, context: Context, next: Handler) -> Handler:
    return lambda request: wrapper.around_request(request, context, next)


async def _close(deltas: AsyncIterator[Sequence[Delta]]) -> None:
    """Let the wrappers run their `finally`. One that is in the middle of a step ends by the cancellation of that step."""
    if (aclose := getattr(deltas, "aclose", None)) is not None:
        with contextlib.suppress(Exception):
            await aclose()


_closing: set[asyncio.Task[None]] = set()
