"""Disaggregated serving, both at once: prefill and decode get the request in the same moment, and meet by a number.

    frontend --- prompt, room ------------------> prefill worker     computes the blocks and keeps them until room was there
    frontend --- prompt, room, meeting point ---> decode worker      goes to the meeting point, fetches the blocks, generates

The prefill worker's stream ends when its blocks were taken; closing it before frees them. So a pair stands and falls together: when one
half is lost before decode has its first token, the other one is given up, and both roles are asked anew with another number.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo_core.cards import Handover, ModelCard
from dynamo_core.config.schema import Migration
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.errors import Cancelled, Disconnected, DynamoError, NoWorker, PeerLost, RequestError, StreamError
from dynamo_core.pipeline.dispatch import Dispatcher, Leg
from dynamo_core.pipeline.handover import HandoverStream, go_on, only_the_prompt
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Output, Request

log = logging.getLogger(__name__)


class Half:
    """The prefill side of a pair, read to its end by a task of its own."""

    def __init__(self, leg: Leg) -> None:
        self.worker = leg.worker
        self.cached_tokens: int | None = None
        self.error: DynamoError | None = None
        self._leg = leg
        self.task = go_on(self._read())

    def close(self) -> None:
        """Whatever it still holds is not wanted. Silent for one that has ended."""
        self._leg.stream.cancel()

    async def _read(self) -> None:
        outcome = "failed"
        try:
            while outputs := await self._leg.stream.read():
                output: Any
                for output in outputs:
                    if output.token_ids:
                        self._leg.received(len(output.token_ids), output.cached_tokens)
                    if output.cached_tokens is not None:
                        self.cached_tokens = output.cached_tokens
            outcome = "done"
        except Cancelled:
            outcome = "cancelled"
        except DynamoError as e:
            self.error = e
        finally:
            self._leg.end(outcome)  # pyright: ignore[reportArgumentType]


class BootstrapStream(HandoverStream):
    """A token stream whose workers come in pairs."""

    def __init__(self, request: Request, card: ModelCard, context: Context, prefill: Dispatcher, decode: Dispatcher,
                 migration: Migration, metrics: PipelineMetrics, *, handover: Callable[[Worker], Handover], fallback: bool) -> None:
        """:param handover: what the card of a prefill worker says of it. :param fallback: decode may read the prompt when no prefill worker can."""
        super().__init__(request, card, context, decode, migration, metrics)
        self._prefill = prefill
        self._fallback = fallback
        self._handover = handover
        self._half: Half | None = None
        self._failed_prefill: list[Worker] = []
        self._alone = False
        """Nobody reads the prompt for decode any more."""
        self._queued = self._unasked  # while decode is not asked, giving up prefill frees its blocks

    async def _dispatch(self, request: Request) -> None:
        half = None if self._alone else await self._ask(request)
        if half is None:
            await super()._dispatch(request)
            return
        half, transfer = half
        try:
            await super()._dispatch(msgspec.structs.replace(request, transfer=transfer))
        except BaseException:
            half.close()
            raise
        self._attached = False
        self._half = half

    async def _ask(self, request: Request) -> tuple[Half, dict[str, Any]] | None:
        """Give a prefill worker its part; `None` when nobody takes it and decode may do everything. :raises DynamoError: it may not."""
        room = secrets.randbits(63)
        asked = msgspec.structs.replace(only_the_prompt(request), transfer={"room": room})
        problem: DynamoError = NoWorker("the prompt")
        for _ in range(self._settings.limit + 1):
            try:
                leg = await self._prefill.dispatch(
                    asked, self._prefill.asked(asked, self._failed_prefill, self._context.tenant), self._context, self._card.block_size, self._unasked)
            except StreamError as e:
                problem = NoWorker("the prompt", [str(e)])
                continue
            except NoWorker as e:
                problem = e
                break
            self.decisions.append(leg.decision.id)
            self.workers.append(self._prefill.label(leg.worker))
            meeting = {"room": room, "prefill_rank": leg.worker.dp_rank, **self._handover(leg.worker).meeting_point}
            return Half(leg), meeting
        if not self._fallback:
            self._failed_prefill.clear()  # whoever comes back deserves another try
            raise problem
        log.warning("request %s: decode reads the prompt itself, because prefill is not to be had: %s", self._request.id, problem)
        self._alone = True
        return None

    def _end(self, outcome: str) -> None:
        half, self._half = self._half, None
        if half is not None:
            half.close()
        super()._end(outcome)

    def _note(self, leg: Leg, outputs: Sequence[Output]) -> None:
        if self._half is not None and self.cached_tokens is None:
            self.cached_tokens = self._half.cached_tokens or 0  # what decode has cached saved no work of this prompt
        super()._note(leg, outputs)

    async def _first(self) -> Sequence[Output]:
        reading = asyncio.create_task(super()._first(), name="first token of a pair")
        try:
            while not reading.done():
                half = self._half
                if half is not None and half.error is not None:
                    await ended(reading)
                    await self._pair_again(half, half.error)
                    reading = asyncio.create_task(super()._first(), name="first token of a pair")
                else:
                    await asyncio.wait((reading,) if half is None or half.task.done() else (reading, half.task), return_when=asyncio.FIRST_COMPLETED)
            return reading.result()
        finally:
            await ended(reading)

    async def _pair_again(self, half: Half, error: DynamoError) -> None:
        """Prefill is lost, and decode waits in vain. :raises DynamoError: there is no other way."""
        self._failed_prefill.append(half.worker)
        self._prefill.failed(half.worker, error)
        if self._leg is not None:
            self._leg.stream.cancel()
        self._end("cancelled")
        if isinstance(error, RequestError):
            raise error
        if not error.migratable and self._fallback:
            self._alone = True
            error = Disconnected(f"prefill could not be done: {error}")
        await self._move(error if isinstance(error, StreamError) and not error.migratable else PeerLost(str(error)))

    async def _arrival(self) -> None:
        assert self._leg is not None
        reading = asyncio.ensure_future(self._leg.stream.read())
        try:
            while not reading.done() and (half := self._half) is not None and half.error is None:
                await asyncio.wait((reading,) if half.task.done() else (reading, half.task), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await ended(reading)
