"""Bookings of requests that somebody else sends: a gateway gets a worker, sends the request there itself, and says how it goes.

Whoever does not say so for too long has vanished, and its bookings are freed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

import attrs
import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, IdInUse, RequestNotFound, Unavailable, from_wire
from dynamo_core.pipeline.dispatch import Booking, Dispatcher
from dynamo_core.routing.contract import RoutingRequest

log = logging.getLogger(__name__)

LIMIT = 100_000
"""Reservations at once: a gateway that never ends any must not make the router grow for ever."""
GRACE = 1.0
"""Seconds by which a reservation is given up late: those of one gateway vanish together, and in one line of the log."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a request is."""

    request_id: str = ""
    tokens: Count = 1
    """Generated so far, of all choices; fewer than said before change nothing. 0: it is still alive."""
    cached_tokens: Count | None = None
    """Prompt tokens that the engine had in its cache."""


class Release(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The end of a request."""

    request_id: str = ""
    outcome: Literal["done", "failed", "cancelled"] | None = None
    """`failed` where there is an `error`, else `done`, when left out."""
    cached_tokens: Count | None = None
    error: Literal["cannot_connect", "disconnected", "stream_timeout", "engine_dead", "worker_overloaded", "worker_draining"] | None = None
    """What the worker did wrong: it is avoided for as long as if a stream of this router had ended so."""


@attrs.define(eq=False)
class _Reservation:
    booking: Booking
    dispatcher: Dispatcher
    until: float = 0.0

    @property
    def model(self) -> str:
        return self.dispatcher.router.model


class Reservations:
    """Open bookings by request id, those heard of longest ago first."""

    def __init__(self, registry: CollectorRegistry, under_way: set[str], *, silence: float, limit: int = LIMIT,
                 clock: Callable[[], float] = time.monotonic) -> None:
        """:param under_way: ids of requests, whoever sends them; kept here for those that wait or are reserved.

        :param silence: seconds without a word after which a reservation is given up.
        """
        self._under_way = under_way
        self._silence = silence
        self._limit = limit
        self._clock = clock
        self._open: OrderedDict[str, _Reservation] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self._count = Gauge("dynamo_router_reservations", "Requests that somebody else sends to workers selected here, and that have not ended.", ["model"],
                            registry=registry)
        self._ended = Counter("dynamo_router_reservations_ended", "Such requests that ended: done, failed, cancelled, or expired.", ["model", "outcome"],
                              registry=registry)

    def __len__(self) -> int:
        return len(self._open)

    async def reserve(self, dispatcher: Dispatcher, asked: RoutingRequest, context: Context, block_size: int) -> Booking:
        """Route as a dispatch does, in the queue if there is one, and book.

        An id that is in use is refused and not altered: what the gateway says of it later must mean one request.

        :raises IdInUse: it is. :raises AllBusy: by the queue, or too many reservations are open. :raises NoWorker: nobody can take it.
        :raises Unavailable: the worker left in this moment. :raises Cancelled: the caller left.
        """
        if asked.id in self._under_way:
            raise IdInUse(f"request {asked.id!r} is under way here; end it first, or choose another id", param="request_id")
        if len(self._open) >= self._limit:
            raise AllBusy(f"request {asked.id!r}", [f"{self._limit} selected requests have not been released"])
        self._under_way.add(asked.id)
        try:
            booking = await dispatcher.book(asked, context, block_size)
            why = (context.cancel_reason or "cancelled") if context.cancelled else None
            if why is not None or booking.worker.instance not in dispatcher.instances:
                booking.end("cancelled")
                raise Cancelled(why) if why is not None else Unavailable("the worker left when it was just selected; ask again")
        except BaseException:
            self._under_way.discard(asked.id)
            raise
        booking.decision.dispatched = booking.worker
        self._open[asked.id] = reservation = _Reservation(booking, dispatcher)
        self._count.labels(reservation.model).inc()
        self._heard_of(reservation)
        return booking

    def progress(self, word: Progress) -> None:
        """:raises RequestNotFound: nobody reserved it, or it has ended."""
        reservation = self._find(word.request_id)
        booking = reservation.booking
        if word.tokens > booking.tokens:
            booking.received(word.tokens - booking.tokens, word.cached_tokens)
        elif word.cached_tokens is not None:
            booking.found(word.cached_tokens)
        self._heard_of(reservation)

    def release(self, word: Release) -> None:
        """:raises RequestNotFound: nobody reserved it, or it has ended."""
        reservation = self._find(word.request_id)
        if word.cached_tokens is not None:
            reservation.booking.found(word.cached_tokens)
        if word.error is not None:
            reservation.dispatcher.failed(reservation.booking.worker, from_wire(word.error, f"a gateway reported {word.error}"))
        outcome = word.outcome or ("done" if word.error is None else "failed")
        self._end(reservation, outcome, outcome)

    def expire(self) -> None:
        """Free the bookings of those that were not heard of for too long."""
        now, expired = self._clock(), 0
        while self._open and (oldest := next(iter(self._open.values()))).until <= now:
            self._end(oldest, "cancelled", "expired")
            expired += 1
        if expired:
            log.warning("%d selected requests were not heard of for %g s, and are taken to have ended", expired, self._silence)

    # --------------------------------------------------------------

    def _find(self, id: str) -> _Reservation:
        if (reservation := self._open.get(id)) is None:
            raise RequestNotFound(f"no request {id!r} is reserved here: it was never selected by this router, has ended, or was not heard of for too long",
                                  param="request_id")
        return reservation

    def _heard_of(self, reservation: _Reservation) -> None:
        reservation.until = self._clock() + self._silence
        self._open.move_to_end(reservation.booking.request_id)
        if self._timer is None:
            self._watch()

    def _watch(self) -> None:
        left = next(iter(self._open.values())).until - self._clock()
        self._timer = asyncio.get_running_loop().call_later(left + GRACE, self._look)

    def _look(self) -> None:
        self._timer = None
        self.expire()
        if self._open:
            self._watch()

    def _end(self, reservation: _Reservation, outcome: Literal["done", "failed", "cancelled"], counted: str) -> None:
        id = reservation.booking.request_id
        del self._open[id]
        self._under_way.discard(id)
        reservation.booking.end(outcome)
        self._count.labels(reservation.model).dec()
        self._ended.labels(reservation.model, counted).inc()
