"""What both protocols of disaggregated serving share: a caller that leaves does not stop the workers while KV blocks are between them.

From the moment when a prefill worker was asked until decode has its first token, the blocks belong to nobody who would free them, or are being
written by one machine into the memory of another. A cancellation waits for that, and a request whose client has left is still handed
over, for one token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Migration
from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, DynamoError
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.types import Output, Request, Sampling, Stops

log = logging.getLogger(__name__)

FETCH = 120.0
"""Seconds that decode has to fetch the blocks of a request whose client has left."""

_handing_over: set[asyncio.Task[Any]] = set()
"""What goes on although nobody reads any more."""


def suits(request: Request) -> bool:
    """Whether a request can be handed over: several choices, and logprobs of the prompt, need the prompt where the answer is made."""
    return request.sampling.n == 1 and request.prompt_logprobs is None and request.transfer is None and not request.resumed


def only_the_prompt(request: Request) -> Request:
    """What prefill is asked. Its one token is thrown away: decode draws it as the request wants it drawn."""
    hints = msgspec.structs.replace(request.hints, instance=None, dp_rank=None, expected_output_tokens=1)
    return msgspec.structs.replace(
        request, sampling=Sampling(temperature=0.0), stops=Stops(max_tokens=1, ignore_eos=True), logprobs=None, guided=None, hints=hints
    )


class HandoverStream(TokenStream):
    """A token stream whose prompt another worker reads."""

    def __init__(self, request: Request, card: ModelCard, context: Context, decode: Dispatcher, migration: Migration, metrics: PipelineMetrics) -> None:
        # Not linked to the caller's: whether a cancellation may reach the workers is decided here.
        inner = Context(context.id, priority=context.priority, session=context.session, tenant=context.tenant, traceparent=context.traceparent)
        super().__init__(request, card, inner, decode, migration, metrics)
        self._unasked = Context(context.id, deadline=context.deadline)
        """Cancelled when the caller leaves: where no worker has been asked yet, nothing is to be waited for."""
        self._attached = False
        """Decode has its first token, and with it the blocks."""
        self._reading = False
        self._left: str | None = None
        """Why the caller has left."""
        self._forget = context.on_cancel(lambda: self.cancel(context.cancel_reason or "cancelled"))

    async def start(self) -> None:
        beginning = asyncio.create_task(self._begin(), name=f"hand over {self._context.id}")
        try:
            await asyncio.shield(beginning)
        except asyncio.CancelledError:
            self._leave("cancelled")
            go_on(self._finish(beginning))
            raise
        if self._left is not None:
            go_on(self._fetch())
            raise Cancelled(self._left)

    async def read(self) -> Sequence[Output]:
        if self._left is not None:
            raise Cancelled(self._left)
        self._reading = True
        try:
            outputs = await (super().read() if self._attached else self._first())
        except asyncio.CancelledError:
            if not self._attached and self._leg is not None:
                self._left = self._left or "cancelled"
                go_on(self._fetch())
            raise
        finally:
            self._reading = False
        self._attached = True
        if self._left is not None:
            super().cancel(self._left)
            raise Cancelled(self._left)
        return outputs

    def cancel(self, reason: str) -> None:
        if self._attached:
            self._forget()
            self._unasked.cancel(reason)
            super().cancel(reason)
        elif self._left is None:
            self._leave(reason)
            if self._leg is not None and not self._reading:
                go_on(self._fetch())

    def _leave(self, reason: str) -> None:
        self._left = self._left or reason
        self._unasked.cancel(self._left)
        if self._attached:
            super().cancel(self._left)

    def finish(self) -> None:
        self._forget()
        super().finish()

    async def _begin(self) -> None:
        await super().start()

    async def _first(self) -> Sequence[Output]:
        """Read until decode has the blocks."""
        return await super().read()

    def _rest(self, lost: DynamoError) -> Request | None:
        request = super()._rest(lost)
        if self._left is not None and self._request.transfer is None:
            raise Cancelled(self._left)  # with the worker that was to have the blocks went what was waited for
        return request

    async def _finish(self, beginning: asyncio.Task[None]) -> None:
        """The caller left while prefill was on its way."""
        await beginning
        await self._fetch()

    async def _fetch(self) -> None:
        """Wait until decode has the blocks, then let it stop."""
        try:
            if self._leg is not None:
                async with asyncio.timeout(FETCH):
                    await self._arrival()
        finally:
            self._attached = True
            super().cancel(self._left or "cancelled")

    async def _arrival(self) -> None:
        assert self._leg is not None
        await self._leg.stream.read()


def go_on(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Do it to the end, whoever has left."""
    task = asyncio.create_task(work, name="finish a hand-over")
    _handing_over.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _handing_over.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, DynamoError | TimeoutError):
        log.error("a hand-over without its client broke", exc_info=error)
