"""One attempt at one request: route it, book it, open its stream, and account for its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from dynamo_core.cards import Role
from dynamo_core.context import Context
from dynamo_core.errors import CannotConnect, Disconnected, DynamoError, EngineDead, RequestError, StreamTimeout, WorkerDraining, WorkerOverloaded
from dynamo_core.pipeline.places import Places, as_engines_see
from dynamo_core.pipeline.waiting import QueueMetrics, WaitingRoom
from dynamo_core.routing.bookings import Outcome
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.record import Decision
from dynamo_core.routing.router import Router
from dynamo_core.runtime import names
from dynamo_core.runtime.channels import Channels
from dynamo_core.transport.contract import Stream
from dynamo_core.types import Instance, Request

_encode = msgspec.msgpack.Encoder().encode

OVERLOAD_PAUSE = 0.25
"""Seconds for which a worker that said it is at capacity is avoided."""


class Booking:
    """The place of one request at one worker: what the router counts on, kept true by whoever hears of the request."""

    __slots__ = ("_block_size", "_grown", "_prefills", "_router", "decision", "request_id", "tokens", "worker")

    def __init__(self, router: Router, decision: Decision, worker: Worker, request_id: str, block_size: int, *, prefills: bool = True) -> None:
        self._router = router
        self._block_size = block_size
        self._prefills = prefills
        self._grown = 0
        self.decision = decision
        self.worker = worker
        self.request_id = request_id
        self.tokens = 0
        """Generated so far, of all choices."""

    def received(self, tokens: int, cached_tokens: int | None) -> None:
        """So many more have come: told to the router at the first token, and at each block boundary after it."""
        if not self.tokens:
            self._router.first_token(self.request_id, self.worker, cached_tokens)
        if cached_tokens is not None:
            self.found(cached_tokens)
        self.tokens += tokens
        if self.tokens - self._grown >= self._block_size:
            self._grown = self.tokens
            self._router.grew(self.request_id, self.worker, self.tokens)

    def found(self, cached_tokens: int | None) -> None:
        """The engine's word on how much of the prompt it had, for engines that have it only after the first token. The first word counts."""
        if self.decision.cached_tokens is None:
            self.decision.cached_tokens = cached_tokens
            if self._prefills:  # engines may count what they have fetched as cached: that says nothing of what the router believed
                self._router.observer.found(self.decision, cached_tokens)

    def end(self, outcome: Outcome) -> None:
        """Free the booking. Call exactly once."""
        self.decision.outcome = outcome
        self._router.finished(self.request_id, self.worker, outcome)


class Leg(Booking):
    """The part of a request that one worker serves."""

    __slots__ = ("stream",)

    def __init__(self, booking: Booking, stream: Stream) -> None:
        super().__init__(booking._router, booking.decision, booking.worker, booking.request_id, booking._block_size, prefills=booking._prefills)
        self.stream = stream


class Dispatcher:
    """The workers of one model in one role, behind one router."""

    def __init__(self, router: Router, channels: Channels, inhibit_seconds: float, queue_metrics: QueueMetrics | None = None) -> None:
        self.router = router
        self.instances: dict[int, Instance] = {}
        self.places = Places()
        """Of the model, whatever the role."""
        self._channels = channels
        self._inhibit_seconds = inhibit_seconds
        self._changed = asyncio.Event()
        self._queue_metrics = queue_metrics
        self._room: WaitingRoom | None = None

    def label(self, worker: Worker) -> str:
        return self.router.label(worker)

    def asked(self, request: Request, failed: Sequence[Worker] = (), tenant: str | None = None) -> RoutingRequest:
        """What the router may know about this request, as one to workers of this role."""
        return routing_request(request, failed, tenant, self.router.role)

    def changed(self) -> None:
        """Wake whoever waits for a worker."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_changed(self, seconds: float) -> None:
        """Return when a worker joins, and after `seconds` at the latest."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def dispatch(self, request: Request, asked: RoutingRequest, context: Context, block_size: int, queued: Context | None = None) -> Leg:
        """Route and open. :raises NoWorker: nobody can take it. :raises CannotConnect: the chosen one does not answer.

        :param queued: whose cancellation and deadline count until a worker was chosen; those of `context` when unset.
        """
        booking = await self.book(asked, context if queued is None else queued, block_size)
        worker = booking.worker
        try:
            if (instance := self.instances.get(worker.instance)) is None:
                raise Disconnected("the worker left before the request was sent")
            if request.hints.dp_rank != worker.dp_rank and (worker.dp_rank or request.hints.dp_rank is not None):
                request = msgspec.structs.replace(request, hints=msgspec.structs.replace(request.hints, dp_rank=worker.dp_rank))
            channel = self._channels.ready(instance.address) or await self._channels.get(instance.address)
            stream = channel.open(f"{instance.namespace}.{instance.component}.{names.GENERATE}", _packed(request), context)
        except BaseException as e:
            booking.end("failed" if isinstance(e, DynamoError) else "cancelled")
            if isinstance(e, CannotConnect):
                self.failed(worker, e)
            raise
        booking.decision.dispatched = worker
        return Leg(booking, stream)

    def check(self, asked: RoutingRequest) -> None:
        """For who has to do work first that would be in vain. :raises NoWorker: nobody could take it now, nor is there a queue to wait in."""
        weighed = self.router.weigh(asked)
        if weighed.choice.worker is None and (self.router.stack.queue is None or not self.router.all_busy(weighed)):
            self.router.settle(weighed)

    async def book(self, asked: RoutingRequest, context: Context, block_size: int) -> Booking:
        """All of a dispatch but the sending: route, wait in the queue if there is one, and book. The caller ends the booking.

        :raises AllBusy: the queue is full, or patience ran out. :raises NoWorker: nobody can take it. :raises Cancelled: the caller left.
        """
        decision = await self._place(asked, context)
        assert decision.worker is not None, "who is placed has a worker"
        return Booking(self.router, decision, decision.worker, asked.id, block_size, prefills=asked.prefills)

    async def _place(self, asked: RoutingRequest, context: Context) -> Decision:
        """Choose and book, now or once there is room."""
        if self.router.stack.queue is None:
            decision = self.router.route(asked)
            if decision.worker is not None:
                self.router.booked(asked, decision.worker, decision.overlap_tokens)
            return decision
        if (room := self._room) is None:
            room = self._room = WaitingRoom(self.router, self._queue_metrics)
            self.router.on_change = room.changed
        return await room.place(asked, context)

    def close(self) -> None:
        """Nobody waits any more."""
        if self._room is not None:
            self._room.close()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return 0 if self._room is None else len(self._room.queue)

    def failed(self, worker: Worker, error: DynamoError) -> None:
        """Avoid a worker that broke a stream, for as long as the kind of break deserves."""
        match error:
            case WorkerOverloaded():
                self.router.inhibit(worker, OVERLOAD_PAUSE, "it said that it is at capacity", busy=True)
            case WorkerDraining():
                self.router.inhibit(worker, self._inhibit_seconds, "it is leaving")
            case CannotConnect() | Disconnected() | StreamTimeout() | EngineDead():
                self.router.inhibit(worker, self._inhibit_seconds, str(error))
            case _:
                pass


def _packed(request: Request) -> bytes:
    """:raises RequestError: it holds a number that has no place on the wire."""
    try:
        return _encode(request)
    except OverflowError as e:
        raise RequestError(f"the request has a number that is too large to be sent: {e}") from e


def routing_request(request: Request, failed: Sequence[Worker] = (), tenant: str | None = None, role: Role = "aggregated") -> RoutingRequest:
    """What policies may know about this request. :param role: of the workers that are asked."""
    token_ids, media = as_engines_see(request.token_ids, request.media) if request.media else (request.token_ids, ())
    return RoutingRequest(
        id=request.id, model=request.model, token_ids=token_ids, prompt_tokens=len(token_ids), role=role, hints=request.hints, adapter=request.adapter,
        cache_salt=request.cache_salt, max_tokens=request.stops.max_tokens, failed=tuple(failed), tenant=tenant, media=media,
        prefills=role != "encode" and (role != "decode" or request.transfer is None),
    )
