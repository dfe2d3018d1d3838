"""Disaggregated serving, prefill first: one worker reads the prompt, another fetches its KV blocks and generates.

    frontend --- prompt, one token ---> prefill worker      keeps the blocks and answers with `transfer`: where they are
    frontend --- prompt, transfer ----> decode worker       fetches the blocks, generates; the prefill worker frees them

`transfer` is the engines' own business. From the moment when prefill was asked until decode has its first token, the blocks belong to
nobody who would free them: a cancellation waits for that, and a request whose client has left is still handed over, for one token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Disaggregation, Migration
from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, DynamoError, NoWorker, RequestError, StreamError
from dynamo_core.pipeline.dispatch import Dispatcher, routing_request
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Output, Request, Sampling, Stops

log = logging.getLogger(__name__)

FETCH = 120.0
"""Seconds that decode has to fetch the blocks of a request whose client has left."""

_handing_over: set[asyncio.Task[Any]] = set()
"""What goes on although nobody reads any more."""


@attrs.frozen
class Prefilled:
    transfer: dict[str, Any]
    cached_tokens: int | None


def suits(request: Request) -> bool:
    """Whether a request can be handed over: several choices, and logprobs of the prompt, need the prompt where the answer is made."""
    return request.sampling.n == 1 and request.prompt_logprobs is None and request.transfer is None and not request.resumed


class DisaggregatedStream(TokenStream):
    """A token stream whose prompt another worker reads. When decode is lost, the next one reads prompt and tokens by itself."""

    def __init__(self, request: Request, card: ModelCard, context: Context, prefill: Dispatcher, decode: Dispatcher, settings: Disaggregation,
                 migration: Migration, metrics: PipelineMetrics) -> None:
        # Not linked to the caller's: whether a cancellation may reach the workers is decided here.
        inner = Context(context.id, priority=context.priority, session=context.session, tenant=context.tenant, traceparent=context.traceparent)
        super().__init__(request, card, inner, decode, migration, metrics)
        self._prefill_dispatcher = prefill
        self._disaggregation = settings
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
            self._left = self._left or "cancelled"
            _go_on(self._finish(beginning))
            raise
        if self._left is not None:
            _go_on(self._fetch())
            raise Cancelled(self._left)

    async def read(self) -> Sequence[Output]:
        if self._left is not None:
            raise Cancelled(self._left)
        self._reading = True
        try:
            outputs = await super().read()
        except asyncio.CancelledError:
            if not self._attached and self._leg is not None:
                self._left = self._left or "cancelled"
                _go_on(self._fetch())
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
            super().cancel(reason)
        elif self._left is None:
            self._left = reason
            if self._leg is not None and not self._reading:
                _go_on(self._fetch())

    def finish(self) -> None:
        self._forget()
        super().finish()

    def _rest(self) -> Request | None:
        # The blocks were fetched, or lost with who held them: whoever goes on computes them.
        self._request = msgspec.structs.replace(self._request, transfer=None)
        return super()._rest()

    # -------------------------------------------------------------- the hand-over

    async def _begin(self) -> None:
        prefilled = await self._prefill()
        if prefilled is not None:
            self._request = msgspec.structs.replace(self._request, transfer=prefilled.transfer)
            self.cached_tokens = prefilled.cached_tokens or 0
        await super().start()

    async def _prefill(self) -> Prefilled | None:
        """Where the prompt's blocks are; `None` when no worker computed them and decode may do it. :raises DynamoError: it may not."""
        request = _only_the_prompt(self._request)
        failed: list[Worker] = []
        problem: DynamoError = NoWorker("the prompt")
        for _ in range(self._settings.limit + 1):
            try:
                return await self._ask(request, failed)
            except RequestError:
                raise
            except StreamError as e:
                problem = e
                if not e.migratable:
                    break
            except NoWorker as e:
                problem = e
                break
        if not self._disaggregation.fallback:
            raise problem
        log.warning("request %s: decode reads the prompt itself, because prefill is not to be had: %s", self._request.id, problem)
        return None

    async def _ask(self, request: Request, failed: list[Worker]) -> Prefilled:
        dispatcher = self._prefill_dispatcher
        leg = await dispatcher.dispatch(request, routing_request(request, failed, self._context.tenant), self._context, self._card.block_size)
        self.decisions.append(leg.decision.id)
        self.workers.append(dispatcher.label(leg.worker))
        outcome = "failed"
        try:
            found = await _read_prefill(leg.stream, leg.received)
            outcome = "done"
            return found
        except StreamError as e:
            failed.append(leg.worker)
            dispatcher.failed(leg.worker, e)
            raise
        finally:
            leg.end(outcome)  # pyright: ignore[reportArgumentType]

    async def _finish(self, beginning: asyncio.Task[None]) -> None:
        """The caller left while prefill was on its way."""
        await beginning
        await self._fetch()

    async def _fetch(self) -> None:
        """Wait until decode has the blocks, then let it stop."""
        try:
            if self._leg is not None:
                async with asyncio.timeout(FETCH):
                    await self._leg.stream.read()
        finally:
            self._attached = True
            super().cancel(self._left or "cancelled")


async def _read_prefill(stream: Any, received: Any) -> Prefilled:
    transfer: dict[str, Any] | None = None
    cached: int | None = None
    while outputs := await stream.read():
        for output in outputs:
            cached = output.cached_tokens if output.cached_tokens is not None else cached
            transfer = output.transfer or transfer
            if output.token_ids:
                received(len(output.token_ids), output.cached_tokens)
    if transfer is None:
        raise StreamError("the prefill worker did not say where the blocks are")
    return Prefilled(transfer, cached)


def _only_the_prompt(request: Request) -> Request:
    """Its one token is thrown away: decode draws it as the request wants it drawn."""
    hints = msgspec.structs.replace(request.hints, instance=request.hints.prefill_instance, prefill_instance=None, dp_rank=None, expected_output_tokens=1)
    return msgspec.structs.replace(
        request, sampling=Sampling(temperature=0.0), stops=Stops(max_tokens=1, ignore_eos=True), logprobs=None, guided=None, hints=hints
    )


def _go_on(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work, name="finish a hand-over")
    _handing_over.add(task)
    task.add_done_callback(_done)


def _done(task: asyncio.Task[Any]) -> None:
    _handing_over.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, DynamoError | TimeoutError):
        log.error("a hand-over without its client broke", exc_info=error)
