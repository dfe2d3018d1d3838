"""Disaggregated serving, prefill first: one worker reads the prompt, another fetches its KV blocks and generates.

    frontend --- prompt, one token ---> prefill worker      keeps the blocks and answers with `transfer`: where they are
    frontend --- prompt, transfer ----> decode worker       fetches the blocks, generates; the prefill worker frees them

`transfer` is the engines' own business.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Disaggregation, Migration
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, CannotConnect, DynamoError, NoWorker, RequestError, StreamError, WorkerOverloaded
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.pipeline.handover import HandoverStream, only_the_prompt
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Request

log = logging.getLogger(__name__)

LAST = 1.0
"""Seconds that a prefill worker has to end its stream after its answer."""


@attrs.frozen
class Prefilled:
    transfer: dict[str, Any]
    cached_tokens: int | None


class DisaggregatedStream(HandoverStream):
    """A token stream whose prompt another worker reads first. When decode is lost, the next one reads prompt and tokens by itself."""

    def __init__(self, request: Request, card: ModelCard, context: Context, prefill: Dispatcher, decode: Dispatcher, settings: Disaggregation,
                 migration: Migration, metrics: PipelineMetrics) -> None:
        super().__init__(request, card, context, decode, migration, metrics)
        self._prefill_dispatcher = prefill
        self._disaggregation = settings

    async def _begin(self) -> None:
        # A prompt that nobody would go on with is not read: its blocks would fill the prefill worker, and nobody would fetch them.
        self._dispatcher.check(self._dispatcher.asked(self._request, tenant=self._context.tenant))
        prefilled = await self._prefill()
        if prefilled is None:
            self._attached = True  # no worker has blocks that somebody must fetch
            if self._left is not None:
                raise Cancelled(self._left)
            await super()._begin()
            return
        self._request = msgspec.structs.replace(self._request, transfer=prefilled.transfer)
        self.cached_tokens = prefilled.cached_tokens or 0
        try:
            await super()._begin()
        except NoWorker as e:
            # Half of it is done: like a request that lost its worker, it waits for another one, full ones included.
            await self._move(WorkerOverloaded(str(e)) if isinstance(e, AllBusy) else CannotConnect(str(e)))

    async def _prefill(self) -> Prefilled | None:
        """Where the prompt's blocks are; `None` when no worker computed them and decode may do it. :raises DynamoError: it may not."""
        request = only_the_prompt(self._request)
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
        leg = await dispatcher.dispatch(request, dispatcher.asked(request, failed, self._context.tenant), self._context, self._card.block_size, self._unasked)
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


async def _let_end(stream: Any) -> None:
    """It has said all that matters. A worker that then hangs holds nobody up."""
    try:
        async with asyncio.timeout(LAST):
            while await stream.read():
                pass
    except (TimeoutError, StreamError):
        stream.cancel()


async def _read_prefill(stream: Any, received: Any) -> Prefilled:
    transfer: dict[str, Any] | None = None
    cached: int | None = None
    finished = False
    while outputs := await stream.read():
        for output in outputs:
            cached = output.cached_tokens if output.cached_tokens is not None else cached
            transfer = output.transfer or transfer
            if output.token_ids:
                received(len(output.token_ids), output.cached_tokens)
            finished = finished or output.finish_reason is not None
        if finished and transfer is not None:
            await _let_end(stream)
            break
    if transfer is None:
        raise StreamError("the prefill worker did not say where the blocks are")
    return Prefilled(transfer, cached)
