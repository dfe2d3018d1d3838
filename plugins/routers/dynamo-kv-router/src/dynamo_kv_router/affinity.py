"""Sessions stay where they are: provider `sessions`, filter `session` (hard) and scorer `session-affinity` (soft)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import msgspec
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import Fact, Fleet, RoutingRequest, Worker
from dynamo_core.types import Instance

SESSION_HERE: Fact[bool] = Fact("session.here", bool, "", "The session of the request was last served by this worker, and not long ago.")

_TOLD = 1000
"""Sessions in one message."""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[tuple[str, int, int, float]]).decode


@attrs.define
class Sessions:
    """Which worker served a session last, through whichever frontend. A session is named by the request (`hints.session`)."""

    ttl: float = attrs.field(default=600.0, validator=[v.ge(1), v.le(31_536_000)], metadata={"duration": True})
    """Seconds of idleness after which a session is bound to nobody."""
    limit: int = attrs.field(default=100_000, validator=v.ge(1))
    """Sessions to remember; beyond it those that were idle for longest are forgotten."""
    provides = (SESSION_HERE,)
    clock: Callable[[], float] = attrs.field(default=time.monotonic, init=False, eq=False, repr=False)
    _bound: OrderedDict[str, tuple[Worker, float]] = attrs.field(factory=OrderedDict, init=False, eq=False, repr=False)
    """In the order of use, but for some of those that other frontends told."""

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None: ...

    def left(self, worker: Worker) -> None:
        self._bound = OrderedDict((name, bound) for name, bound in self._bound.items() if bound[0] != worker)

    # Bookings come from all frontends: a session may change from one to the other and finds its worker again.

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        if (session := request.hints.session) is not None:
            self._bound[session] = (worker, self.clock())
            self._bound.move_to_end(session)
            self._forget()

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None: ...

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None: ...

    def state(self) -> Sequence[bytes]:
        """All that is bound, with ages: clocks of other processes tell other times."""
        self._forget()
        now = self.clock()
        rows = [(session, *worker, now - used) for session, (worker, used) in self._bound.items()]
        return [_encode(rows[i : i + _TOLD]) for i in range(0, len(rows), _TOLD)]

    def learn(self, message: bytes) -> None:
        """:raises msgspec.MsgspecError: it is something else."""
        now = self.clock()
        for session, instance, rank, age in _decode(message):
            known = self._bound.get(session)
            if (used := now - max(0.0, age)) > now - self.ttl and (known is None or known[1] < used):
                self._bound[session] = (Worker(instance, rank), used)
        self._forget()

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Mapping[Fact[Any], Sequence[Any]]:
        bound = self._bound.get(request.hints.session) if request.hints.session is not None else None
        if bound is None or self.clock() - bound[1] > self.ttl:
            return {SESSION_HERE: (False,) * len(workers)}
        return {SESSION_HERE: tuple([worker == bound[0] for worker in workers])}

    def _forget(self) -> None:
        oldest = self.clock() - self.ttl
        while self._bound and (len(self._bound) > self.limit or next(iter(self._bound.values()))[1] < oldest):
            self._bound.popitem(last=False)


@attrs.frozen
class SessionFilter:
    """Keeps the worker that the session is bound to. A session whose worker is gone, or may not serve, is bound anew."""

    needs = (SESSION_HERE,)

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        here = fleet[SESSION_HERE]
        if not any(here):
            return {}
        return {i: "the session is bound to another worker" for i, is_here in enumerate(here) if not is_here}


@attrs.frozen
class SessionAffinity:
    """1 for the worker that the session is bound to, 0 for all others."""

    needs = (SESSION_HERE,)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        return [1.0 if is_here else 0.0 for is_here in fleet[SESSION_HERE]]
