"""What is under way: every request that was sent to a worker, from its booking to its end, here and through other frontends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import attrs

from dynamo_core.routing.contract import FollowsRequests, RoutingRequest, Worker
from dynamo_core.routing.decide import Part
from dynamo_core.routing.roster import Roster
from dynamo_core.routing.sources import Observer

Outcome = Literal["done", "failed", "cancelled"]


class Share(Protocol):
    """What tells the routers of other frontends. Called on the request path: keep it short, and never raise."""

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None: ...

    def first_token(self, request_id: str, worker: Worker) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None: ...

    def finished(self, request_id: str, worker: Worker) -> None: ...


@attrs.define
class _Open:
    """A booking, kept so that a provider that joins later learns of it."""

    request: RoutingRequest
    overlap_tokens: int
    first: bool = False
    cached_tokens: int | None = None
    output_tokens: int = 0
    elsewhere: bool = False
    """Another frontend's router booked it."""


class Bookings(Roster):
    """Providers that follow requests hear of each, and so do the routers of other frontends."""

    def __init__(self, model: str, *, observer: Observer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(model, observer=observer, clock=clock)
        self.share: Share | None = None
        self._open: dict[tuple[str, Worker], _Open] = {}
        self._follow_requests: tuple[Part, ...] = ()

    def replace(self, wanted: Sequence[Part]) -> None:
        super().replace(wanted)
        self._follow_requests = self._those(FollowsRequests)

    def _introduce(self, part: Part) -> None:
        super()._introduce(part)
        provider = part.component
        if isinstance(provider, FollowsRequests):
            for (request_id, worker), booking in self._open.items():
                self._safely(part, provider.booked, booking.request, worker, booking.overlap_tokens)
                if booking.first:
                    self._safely(part, provider.first_token, request_id, worker, booking.cached_tokens)
                if booking.output_tokens:
                    self._safely(part, provider.grew, request_id, worker, booking.output_tokens)

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int = 0, *, elsewhere: bool = False) -> None:
        """`request` was sent to `worker`. Every booking is closed by `finished`. :param elsewhere: by another frontend, which tells this one."""
        self._open[request.id, worker] = _Open(request, overlap_tokens, elsewhere=elsewhere)
        for part in self._follow_requests:
            self._safely(part, part.component.booked, request, worker, overlap_tokens)
        if self.share is not None and not elsewhere:
            self.share.booked(request, worker, overlap_tokens)

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None = None) -> None:
        if (booking := self._open.get((request_id, worker))) is not None:
            booking.first, booking.cached_tokens = True, cached_tokens
            for part in self._follow_requests:
                self._safely(part, part.component.first_token, request_id, worker, cached_tokens)
            if self.share is not None and not booking.elsewhere:
                self.share.first_token(request_id, worker)
            self._changed()

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        """`output_tokens` have come so far. Call it at block boundaries."""
        if (booking := self._open.get((request_id, worker))) is not None:
            booking.output_tokens = output_tokens
            for part in self._follow_requests:
                self._safely(part, part.component.grew, request_id, worker, output_tokens)
            if self.share is not None and not booking.elsewhere:
                self.share.grew(request_id, worker, output_tokens)

    def finished(self, request_id: str, worker: Worker, outcome: Outcome) -> None:
        """Close a booking. Once is enough; again does nothing."""
        if (booking := self._open.pop((request_id, worker), None)) is not None:
            for part in self._follow_requests:
                self._safely(part, part.component.finished, request_id, worker, outcome)
            if self.share is not None and not booking.elsewhere:
                self.share.finished(request_id, worker)
            self._changed()

    def open_here(self) -> list[tuple[RoutingRequest, Worker, int, bool, int]]:
        """Bookings of this router alone: request, worker, overlap tokens, whether the first token came, output tokens."""
        return [(b.request, worker, b.overlap_tokens, b.first, b.output_tokens) for (_, worker), b in self._open.items() if not b.elsewhere]
