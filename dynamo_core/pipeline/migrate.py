"""The token stream of one request, whoever serves it: when a worker is lost, the next one goes on where it stopped.

The tokens that the client has already been given become part of the prompt of the next attempt, so that under greedy
sampling the whole is token for token what one worker would have said. What cannot be continued exactly (several choices, a
grammar that would restart, a pinned worker) is moved only while nothing has been given out, or not at all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Migration
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, CannotConnect, Disconnected, DynamoError, NoWorker, PeerLost, StreamError, Unavailable, WorkerOverloaded
from dynamo_core.pipeline.dispatch import Dispatcher, Leg
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.routing.contract import Worker
from dynamo_core.transport.contract import Listening
from dynamo_core.types import Output, Request

log = logging.getLogger(__name__)


class TokenStream:
    """Reads outputs; moves between workers by itself. `start` first; then `read` until it returns nothing, or `cancel`."""

    def __init__(self, request: Request, card: ModelCard, context: Context, dispatcher: Dispatcher, settings: Migration, metrics: PipelineMetrics) -> None:
        self.decisions: list[str] = []
        self.workers: list[str] = []
        self.cached_tokens: int | None = None
        self._request = request
        self._card = card
        self._context = context
        self._queued = context
        """Cancelled when nobody wants a request any more that waits for a worker."""
        self._dispatcher = dispatcher
        self._settings = settings
        self._metrics = metrics
        self._leg: Leg | None = None
        self._cut_short = False
        """The worker was lost when only its last word, the finish reason, was missing."""
        self._emitted: list[int] = []
        self._open_choices = request.sampling.n
        self._moves = 0
        self._lost_at: float | None = None
        """When the request lost its worker; until the next token it is without one."""
        self._failed: list[Worker] = []
        self._sink: Callable[[Sequence[Output]], bool] | None = None
        self.elsewhere = False
        """The caller has another place for the request, until the first output: nobody is waited for here."""

    async def start(self) -> None:
        """:raises DynamoError: nobody took the request."""
        try:
            await self._dispatch(self._request)
        except StreamError as e:
            await self._move(e)

    async def read(self) -> Sequence[Output]:
        """Outputs that have arrived, at least one; empty at the end. :raises DynamoError: it cannot go on."""
        while True:
            leg = self._leg
            if leg is None:
                if not self._cut_short:
                    return ()
                self._cut_short, self._open_choices = False, 0
                return (Output([], 0, "length"),)
            try:
                outputs: Sequence[Output] = await leg.stream.read()  # pyright: ignore[reportAssignmentType]
            except StreamError as e:
                await self._move(e)
                continue
            except DynamoError as e:
                self._end("cancelled" if isinstance(e, Cancelled) else "failed")
                raise
            if outputs:
                self._note(leg, outputs)
                return outputs
            if self._open_choices <= 0:
                self._end("done")
                return ()
            await self._move(Disconnected("the worker ended the stream before its end"))

    def listen(self, sink: Callable[[Sequence[Output]], bool] | None) -> None:
        """While `read` waits, offer outputs to `sink` in the callback that brings them, whichever worker it is. Only plain ones: tokens
        without an end, and without anything else that is said once. What the sink declines is read. `None` ends that."""
        self._sink = sink
        if self._leg is not None and sink is not None:
            self._attach(self._leg, sink)

    def cancel(self, reason: str) -> None:
        """Stop wherever it is. Idempotent."""
        self._context.cancel(reason)
        self._end("cancelled")

    def finish(self) -> None:
        """The reader has all it wants. When that was a stop string, the engine would go on: it is told to stop."""
        if self._leg is not None:
            if self._open_choices > 0:
                self._leg.stream.cancel()
            self._end("done")

    # --------------------------------------------------------------

    def _attach(self, leg: Leg, sink: Callable[[Sequence[Output]], bool]) -> None:
        if not isinstance(leg.stream, Listening):
            return

        def take(outputs: Sequence[Output]) -> bool:
            if self._leg is not leg or self._lost_at is not None:
                return False
            tokens: list[int] = []
            for output in outputs:
                if output.finish_reason is not None or output.cached_tokens is not None or output.prompt_logprobs is not None:
                    return False
                tokens += output.token_ids
            if not sink(outputs):
                return False
            self._emitted += tokens
            leg.received(len(tokens), None)
            return True

        leg.stream.listen(take)  # pyright: ignore[reportArgumentType]

    def _note(self, leg: Leg, outputs: Sequence[Output]) -> None:
        tokens = 0
        cached = None
        for output in outputs:
            tokens += len(output.token_ids)
            self._emitted += output.token_ids
            if output.finish_reason is not None:
                self._open_choices -= 1
            if output.cached_tokens is not None:
                cached = output.cached_tokens
                if output.places is not None:
                    self._dispatcher.places.learn(self._request, output.places)
        if self.cached_tokens is None:
            # Only the first worker's word counts: the next one finds replayed tokens in its cache, not the client's.
            self.cached_tokens = cached if cached is not None else (0 if self._moves else None)
        if tokens:
            self._lost_at = None
            leg.received(tokens, cached)

    async def _dispatch(self, request: Request) -> None:
        asked = self._dispatcher.asked(request, self._failed, self._context.tenant)
        leg = await self._dispatcher.dispatch(request, asked, self._context, self._card.block_size, self._queued)
        self._leg = leg
        if self._sink is not None:
            self._attach(leg, self._sink)
        self.decisions.append(leg.decision.id)
        self.workers.append(self._dispatcher.label(leg.worker))

    def _end(self, outcome: str) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.end(outcome)  # pyright: ignore[reportArgumentType]

    async def _move(self, error: StreamError) -> None:
        """Go on elsewhere. :raises DynamoError: it must not, or cannot."""
        lost = self._leg
        self._end("failed")
        if lost is not None and not isinstance(error, PeerLost):
            self._failed.append(lost.worker)
            self._dispatcher.failed(lost.worker, error)
        if (why_not := self._immovable(error)) is not None:
            raise _for_client(error, why_not)
        kind = "ongoing_request" if self._emitted else "new_request"
        started = time.monotonic()
        begun = bool(self._emitted) or self._request.transfer is not None
        if self._lost_at is None and (begun or not isinstance(error, WorkerOverloaded)):
            self._lost_at = started
        # Who had a worker waits for another one, full ones included; who comes new to a full fleet is told at once.
        elsewhere = self.elsewhere and not self._emitted
        patient = self._lost_at is not None and not elsewhere
        deadline = (self._lost_at or started) + (0.0 if elsewhere else self._settings.wait)
        cause: DynamoError = error
        while True:
            if self._context.cancelled:
                raise Cancelled(self._context.cancel_reason or "cancelled")
            if patient and isinstance(cause, WorkerOverloaded):
                if time.monotonic() >= deadline:
                    self._metrics.migrated(kind, "failure", time.monotonic() - started)
                    raise _for_client(cause, f"every other worker was full for {self._settings.wait:g} s (migration.wait)")
            elif isinstance(cause, StreamError):
                if self._moves >= self._settings.limit:
                    self._metrics.migrated(kind, "failure", time.monotonic() - started)
                    raise _for_client(error, f"it has moved {self._moves} times already (migration.limit)")
                self._moves += 1
            request = self._rest(cause)
            if request is None:
                self._cut_short = True
                return
            try:
                await self._dispatch(request)
            except StreamError as e:
                cause = error = e
                continue
            except NoWorker as e:
                left = deadline - time.monotonic()
                if isinstance(error, WorkerOverloaded) and not patient:
                    raise AllBusy(f"request {self._request.id}", [str(error)]) from e
                if left <= 0:
                    self._metrics.migrated(kind, "failure", time.monotonic() - started)
                    raise _for_client(error, f"no other worker was there within {self._settings.wait:g} s: {e}") from e
                cause = e
                await self._dispatcher.wait_changed(min(left, 0.5))
                # Whoever is back in the fleet deserves another try; the router still avoids those that it inhibits.
                self._failed.clear()
                continue
            self._metrics.migrated(kind, "success", time.monotonic() - started)
            log.info("request %s moved to %s after %d tokens: %s", self._request.id, self.workers[-1], len(self._emitted), error)
            return

    def _immovable(self, error: StreamError) -> str | None:
        if not error.migratable:
            return "such an error would come back elsewhere"
        if self._settings.limit == 0:
            return "migration is off (migration.limit)"
        if self._request.hints.instance is not None and not isinstance(error, PeerLost):
            return "it was pinned to that worker"
        if self._emitted and self._request.sampling.n > 1:
            return "several choices cannot be continued"
        if self._emitted and self._request.guided is not None and "guided_resume" not in self._card.capabilities:
            return "guided output cannot be continued by this engine"
        return None

    def _rest(self, lost: DynamoError) -> Request | None:
        """The request that asks for what is still missing; `None` when only the end was missing."""
        emitted = self._emitted
        if self._request.transfer is not None and not isinstance(lost, NoWorker | WorkerOverloaded | CannotConnect):
            # The blocks were fetched, or lost with who held them: whoever goes on computes them. Who took nothing has fetched nothing.
            self._request = msgspec.structs.replace(self._request, transfer=None)
        if not emitted:
            return self._request
        stops = self._request.stops
        left = None if stops.max_tokens is None else stops.max_tokens - len(emitted)
        if left is not None and left <= 0:
            return None
        return msgspec.structs.replace(
            self._request, token_ids=self._request.token_ids + emitted, resumed=self._request.resumed + len(emitted), prompt_logprobs=None,
            stops=msgspec.structs.replace(stops, max_tokens=left, min_tokens=max(0, stops.min_tokens - len(emitted))),
        )


def _for_client(error: StreamError, why_not: str) -> DynamoError:
    """What the client is told when the stream is lost for good."""
    if not error.migratable:
        return error
    if isinstance(error, WorkerOverloaded):
        return AllBusy("the request", [str(error), why_not])
    return Unavailable(f"the worker was lost ({error}) and the request cannot go on: {why_not}")


