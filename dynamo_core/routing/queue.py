"""Where requests wait while no worker has room, and the order in which they go.

No tasks, no locks, no timers: whoever owns it calls `submit` for a request and `release` when something has changed, in real
or in virtual time, and is told of each request that is settled.

Classes share by virtual time: a class that lets go `n` tokens ages by `n / share`, and the youngest class is next. Within a
class the order is strict priority, then `order`. Ageing lowers all keys alike with time, so that a key never changes by itself.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import attrs

from dynamo_core.config.schema import Queue, QueueClass
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS, MAX_BATCHED_TOKENS, OVERLAP_TOKENS
from dynamo_core.routing.record import Decision
from dynamo_core.routing.router import Router, Weighed

_SAMPLE = 512
"""Requests from which it is known what counts as long."""


@attrs.define(eq=False)
class Ticket:
    """A request in the queue, or out of it: then it has a decision, or an error."""

    request: RoutingRequest
    arrived: float
    of: str
    """Its class."""
    settled: Callable[[Ticket], None] | None = None
    uncached: int = 0
    """Prompt tokens that the best worker does not hold, as last looked at."""
    key: tuple[float, ...] = ()
    decision: Decision | None = None
    """Booked already."""
    error: NoWorker | None = None

    @property
    def waiting(self) -> bool:
        return self.decision is None and self.error is None


class QueueObserver(Protocol):
    def waited(self, ticket: Ticket, seconds: float) -> None:
        """A request left the queue to a worker; also when it never had to wait."""
        ...

    def turned_away(self, of: str, why: str) -> None:
        """`limit`, `class_limit`, `token_limit`, `max_wait` or `no_worker`."""
        ...


class _Class:
    def __init__(self, settings: QueueClass, order: str) -> None:
        self.settings = settings
        self.order = settings.order or order
        self.tickets: list[Ticket] = []
        self.tokens = 0
        self.age = 0.0
        """Uncached tokens let go, over the share."""

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, ticket, key=_key)
        self.tokens += ticket.request.prompt_tokens

    def remove(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)
        self.tokens -= ticket.request.prompt_tokens


def _key(ticket: Ticket) -> tuple[float, ...]:
    return ticket.key


class RouterQueue:
    """Holds requests of one router. A decision that leaves it is booked: the owner unbooks what he cannot send."""

    def __init__(self, router: Router, settings: Queue, observer: QueueObserver | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.router = router
        self._observer = observer
        self._clock = clock
        self._arrange(settings)
        self._sizes: deque[int] = deque(maxlen=_SAMPLE)
        self._long: float = float("inf")
        self._seen = 0
        self._no_room = False
        """Nobody had room when last looked at, and nothing has happened since."""

    def _arrange(self, settings: Queue) -> None:
        self.settings = settings
        classes = settings.classes or (QueueClass("default"),)
        self._classes = {c.name: _Class(c, settings.order) for c in classes}
        self._by_size = sorted((c for c in classes if c.up_to is not None), key=lambda c: c.up_to or 0)
        self._rest = next((c.name for c in classes if c.up_to is None), classes[-1].name)

    def follow(self, settings: Queue) -> None:
        """Wait by these settings from now on. Who waits already keeps its time of arrival, and its place even where new limits are narrower."""
        waiting = [ticket for of in self._classes.values() for ticket in of.tickets]
        self._arrange(settings)
        for ticket in sorted(waiting, key=lambda ticket: ticket.arrived):
            self._keyed(ticket)
            self._classes[ticket.of].add(ticket)
        self._no_room = False

    def __len__(self) -> int:
        """How many wait."""
        return sum(len(c.tickets) for c in self._classes.values())

    def waiting(self) -> dict[str, int]:
        """By class."""
        return {name: len(c.tickets) for name, c in self._classes.items()}

    # -------------------------------------------------------------- coming and going

    def submit(self, request: RoutingRequest, settled: Callable[[Ticket], None] | None = None) -> Ticket:
        """Send the request to a worker now if it may go, and otherwise keep it.

        :param settled: called once when a request that had to wait is decided or refused.
        :raises AllBusy: no room to wait. :raises NoWorker: nobody can take it.
        """
        if not request.prompt_tokens:
            request = attrs.evolve(request, prompt_tokens=len(request.token_ids))
        ticket = Ticket(request, self._clock(), self._rest, settled)
        alone = not len(self)
        if alone:
            self.router.unparked()
        weighed = self._weigh(ticket)
        if weighed.choice.worker is None and not self.router.all_busy(weighed):
            self._observe_refusal(ticket, "no_worker")
            self.router.settle(weighed)
        self._note(ticket.uncached)
        self._keyed(ticket)
        if alone or not request.prefills:
            if may_go := self._may_go(request, weighed):
                self._go(ticket, weighed, fresh=True)
                return ticket
            if alone:
                self._no_room = may_go is None
        self._enter(ticket)
        if not self._no_room:
            self.release()
        return ticket

    def release(self) -> list[Ticket]:
        """Let go who may go: call it when a prefill or a request has ended, a worker has come or recovered, and now and then. Returns who was settled."""
        settled = self._expire()
        self._no_room = False
        if not len(self):
            return settled
        self.router.unparked()
        passed = 0
        for ticket in self._in_order():
            weighed = self._weigh(ticket)
            match self._may_go(ticket.request, weighed):
                case True:
                    self._leave(ticket)
                    self._go(ticket, weighed)
                    settled.append(ticket)
                    continue
                case None:
                    self._no_room = True
                case False if weighed.choice.worker is None and not self.router.all_busy(weighed):
                    self._leave(ticket)
                    self._refuse(ticket, weighed)
                    settled.append(ticket)
                    continue
                case False:
                    if weighed.choice.worker is not None:
                        self.router.parked(ticket.request, weighed.choice.worker, _overlap(weighed))
            self._rekey(ticket)
            passed += 1
            if self._no_room or passed >= self.settings.lookahead:
                break
        return settled

    def changed(self) -> None:
        """Something happened that may have made room; `release` follows."""
        self._no_room = False

    def cancel(self, ticket: Ticket) -> None:
        """The caller went away. Nothing happens to a request that is out already."""
        if ticket.waiting and ticket in self._classes[ticket.of].tickets:
            self._leave(ticket)

    def refuse_all(self, why: str) -> None:
        """The end: everybody who waits is told so."""
        for ticket in [t for c in self._classes.values() for t in c.tickets]:
            self._leave(ticket)
            ticket.error = AllBusy(f"request {ticket.request.id}", [why])
            self._tell(ticket)

    # -------------------------------------------------------------- who may go

    def _weigh(self, ticket: Ticket) -> Weighed:
        weighed = self.router.weigh(ticket.request)
        overlaps = weighed.columns.get(OVERLAP_TOKENS)
        held = max((overlaps[row] for row in weighed.choice.candidates), default=0) if overlaps is not None else 0
        ticket.uncached = max(0, ticket.request.prompt_tokens - int(held))
        return weighed

    def _may_go(self, request: RoutingRequest, weighed: Weighed) -> bool | None:
        """`None`: nobody has room for the least of requests, so that nobody else may go either."""
        choice = weighed.choice
        if choice.worker is None:
            return False
        if not request.prefills:
            return True  # what it asks of the worker is no prefill, and somebody may keep its blocks until they are fetched
        booked, most = weighed.columns.get(BOOKED_PREFILL_TOKENS), weighed.columns.get(MAX_BATCHED_TOKENS)
        if booked is None or most is None:
            return True
        prompt, overlaps = weighed.request.prompt_tokens, weighed.columns.get(OVERLAP_TOKENS)
        for row in (weighed.workers.index(choice.worker),) if self.settings.wait_for == "best" else choice.candidates:
            if self._has_room(booked[row], most[row], prompt - (0 if overlaps is None else int(overlaps[row]))):
                return True
        return False if any(map(self._has_room, booked, most, repeat(1))) else None

    def _has_room(self, booked: int, most: int, uncached: int) -> bool:
        """Short requests may join what an engine can prefill in one pass; a long one gains nothing by waiting there."""
        limit, share = self.settings.prefill_tokens, self.settings.prefill_share
        tokens = booked + uncached
        return not booked or ((limit is None or tokens <= limit) and (share is None or not most or tokens <= share * most))

    def _in_order(self) -> Iterator[Ticket]:
        """Everybody, as fair shares and orders have it; a snapshot."""
        queues = [(c, list(c.tickets)) for c in self._classes.values() if c.tickets]
        if len(queues) == 1:
            yield from queues[0][1]
            return
        at = [0] * len(queues)
        ages = [c.age for c, _ in queues]
        while live := [k for k, (_, tickets) in enumerate(queues) if at[k] < len(tickets)]:
            k = min(live, key=lambda k: ages[k])
            ticket = queues[k][1][at[k]]
            at[k] += 1
            ages[k] += (ticket.uncached + 1) / queues[k][0].settings.share
            yield ticket

    # -------------------------------------------------------------- order

    def _keyed(self, ticket: Ticket) -> None:
        ticket.of = self._class_of(ticket)
        ticket.key = self._key_of(ticket)

    def _key_of(self, ticket: Ticket) -> tuple[float, ...]:
        priority = -ticket.request.hints.priority
        if self._classes[ticket.of].order == "fcfs":
            return (priority, ticket.arrived)
        if ticket.uncached >= self._long:
            return (priority, 0.0, ticket.arrived)
        return (priority, 1.0, ticket.uncached + self.settings.ageing * ticket.arrived)

    def _rekey(self, ticket: Ticket) -> None:
        """Its uncached tokens may be others than when it came."""
        if (key := self._key_of(ticket)) != ticket.key:
            of = self._classes[ticket.of]
            of.remove(ticket)
            ticket.key = key
            of.add(ticket)

    def _note(self, uncached: int) -> None:
        if share := self.settings.longest_first:
            self._sizes.append(uncached)
            self._seen += 1
            if self._seen % 16 == 0 and len(self._sizes) >= 64:
                self._long = sorted(self._sizes)[min(len(self._sizes) - 1, int((1.0 - share) * len(self._sizes)))]

    def _class_of(self, ticket: Ticket) -> str:
        if (named := ticket.request.hints.policy_class) in self._classes:
            return str(named)
        return next((c.name for c in self._by_size if ticket.uncached <= (c.up_to or 0)), self._rest)

    # -------------------------------------------------------------- in and out

    def _enter(self, ticket: Ticket) -> None:
        of = self._classes[ticket.of]
        limits = (
            ("limit", len(self), self.settings.limit, "the router's queue is full: {} requests wait"),
            ("class_limit", len(of.tickets), of.settings.limit, f"class {ticket.of!r} has its limit of {{}} waiting requests"),
            ("token_limit", of.tokens + ticket.request.prompt_tokens - 1, of.settings.token_limit, f"class {ticket.of!r} has its limit of {{}} waiting tokens"),
        )
        for name, is_, limit, why in limits:
            if limit is not None and is_ >= limit:
                self._observe_refusal(ticket, name)
                ticket.error = AllBusy(f"request {ticket.request.id}", [why.format(limit)])
                raise ticket.error
        if not len(self):
            # Shares count while classes wait beside each other: what went when nobody waited is forgotten.
            for each in self._classes.values():
                each.age = 0.0
        elif not of.tickets:
            # A class that was idle has no claim to the time before.
            of.age = max(of.age, min(c.age for c in self._classes.values() if c.tickets))
        of.add(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self._classes[ticket.of].remove(ticket)
        if not len(self):
            # No look follows that would take back what the last one promised to workers.
            self.router.unparked()

    def _go(self, ticket: Ticket, weighed: Weighed, *, fresh: bool = False) -> None:
        waited = 0.0 if fresh else self._clock() - ticket.arrived
        decision = self.router.settle(weighed, waited)
        assert decision.worker is not None, "only who has a worker goes"
        self.router.booked(ticket.request, decision.worker, decision.overlap_tokens)
        ticket.decision = decision
        of = self._classes[ticket.of]
        of.age += (ticket.uncached + 1) / of.settings.share
        if self._observer is not None:
            self._observer.waited(ticket, waited)
        if not fresh:
            self._tell(ticket)

    def _refuse(self, ticket: Ticket, weighed: Weighed) -> None:
        try:
            self.router.settle(weighed, self._clock() - ticket.arrived)
        except NoWorker as e:
            ticket.error = e
        self._observe_refusal(ticket, "no_worker")
        self._tell(ticket)

    def _expire(self) -> list[Ticket]:
        oldest = self._clock() - self.settings.max_wait
        late = [t for c in self._classes.values() for t in c.tickets if t.arrived <= oldest]
        for ticket in late:
            self._leave(ticket)
            ticket.error = AllBusy(f"request {ticket.request.id}", [f"it waited {self.settings.max_wait:g} s in the router's queue"])
            self._observe_refusal(ticket, "max_wait")
            self._tell(ticket)
        return late

    def _observe_refusal(self, ticket: Ticket, why: str) -> None:
        if self._observer is not None:
            self._observer.turned_away(ticket.of, why)

    def _tell(self, ticket: Ticket) -> None:
        if ticket.settled is not None:
            ticket.settled(ticket)


def _overlap(weighed: Weighed) -> int:
    column: Sequence[Any] | None = weighed.columns.get(OVERLAP_TOKENS)
    worker: Worker | None = weighed.choice.worker
    return 0 if column is None or worker is None else int(column[weighed.workers.index(worker)])
