"""One router: for one model and role it joins providers, stack, dice and ring, and decides.

Everything here is synchronous and belongs to one event loop. A provider that breaks is left out, with those policies that
need its facts; requests go on.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import attrs

from dynamo_core.cards import ModelCard, Role
from dynamo_core.errors import AllBusy, NoWorker
from dynamo_core.routing.contract import (
    Dice,
    Fact,
    FollowsDecisions,
    FollowsEvents,
    FollowsFleet,
    FollowsHealth,
    FollowsQueue,
    FollowsRequests,
    RoutingRequest,
    Worker,
)
from dynamo_core.routing.decide import Choice, Part, Stack, options_of, said
from dynamo_core.routing.patience import Patience
from dynamo_core.routing.record import Decision
from dynamo_core.routing.ring import Ring
from dynamo_core.types import Instance

log = logging.getLogger(__name__)

Outcome = Literal["done", "failed", "cancelled"]
_MASK = 0xFFFFFFFFFFFFFFFF


class Observer(Protocol):
    """What metrics and tracing implement. Called on the request path: keep it short, and never raise."""

    def decided(self, decision: Decision, seconds: float) -> None:
        """One decision, successful or not (`worker` is `None`), dry runs included."""
        ...

    def fault(self, component: str, what: str) -> None:
        """A policy or a fact provider broke its contract, and was left out."""
        ...

    def found(self, decision: Decision, cached_tokens: int | None) -> None:
        """The first token of the request came, and with it the engine's word on how much of the prompt it had."""
        ...


class Share(Protocol):
    """What tells the routers of other frontends. Called on the request path: keep it short, and never raise."""

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None: ...

    def first_token(self, request_id: str, worker: Worker) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None: ...

    def finished(self, request_id: str, worker: Worker) -> None: ...


class Unobserved:
    """The observer of a router that nobody watches."""

    def decided(self, decision: Decision, seconds: float) -> None: ...

    def fault(self, component: str, what: str) -> None: ...

    def found(self, decision: Decision, cached_tokens: int | None) -> None: ...


@attrs.define
class _Member:
    instance: Instance
    card: ModelCard
    label: str
    proven: bool = False
    draining: bool = False
    inhibited_until: float = 0.0
    why: str = ""
    busy: bool = False
    """It is inhibited because it is full."""


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


@attrs.frozen(eq=False)
class Weighed:
    """A decision that was not taken yet."""

    request: RoutingRequest
    """Without the prompt and the cache salt."""
    columns: Mapping[Fact[Any], Sequence[Any]]
    choice: Choice
    workers: Sequence[Worker]
    labels: Sequence[str]
    seed: int
    started: float


class Router:
    """Decides for one (model, role), and tells its fact providers what happens.

    :param clock: seconds, for inhibition and the age of facts; :param wall: Unix time, for records. Virtual time replaces both.
    """

    def __init__(
        self, model: str, stack: Stack, *, role: Role = "aggregated", seed: int = 0, decisions: int = 4096, ring: Ring | None = None,
        observer: Observer | None = None, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:
        self.model = model
        self.role: Role = role
        self.ring = Ring(decisions) if ring is None else ring
        self.observer: Observer = observer or Unobserved()
        self.faults: Counter[str] = Counter()
        """How often each policy and provider was left out."""
        self.generation = 0
        self.patience = Patience()
        self.share: Share | None = None
        self.on_change: Callable[[], None] | None = None
        """Called when a worker may have got room: a prefill or a request ended, a worker came, left or recovered."""
        self._clock = clock
        self._wall = wall
        self._seed = seed
        self._decided = 0
        self._recorded = 0
        self._prefix = secrets.token_hex(4)
        self._members: dict[Worker, _Member] = {}
        self._open: dict[tuple[str, Worker], _Open] = {}
        self._workers: tuple[Worker, ...] = ()
        self._labels: tuple[str, ...] = ()
        self._providers: tuple[Part, ...] = ()
        self.swap(stack)

    # -------------------------------------------------------------- deciding

    def route(self, request: RoutingRequest) -> Decision:
        """Choose a worker. The caller books it (`booked`) before anything else is routed, and sets `dispatched` on the record.

        :raises AllBusy: every worker that could take the request is at its limit. :raises NoWorker: nobody can take it.
        """
        return self.settle(self.weigh(request))

    def dry_run(self, request: RoutingRequest) -> Decision:
        """What `route` would decide now. It is recorded, and changes nothing else; never raises for want of workers."""
        return self._record(self.weigh(request), dry_run=True)

    def weigh(self, request: RoutingRequest) -> Weighed:
        """What `route` would decide now, neither recorded nor told to anybody. `settle` makes it the decision, if that comes before anything else."""
        started = time.perf_counter()
        columns = self._columns(request)
        seed = self._seed_of(self._decided)
        tokens = request.prompt_tokens or len(request.token_ids)
        bare = RoutingRequest(
            request.id, request.model, (), tokens, request.role, request.hints, request.adapter, None, request.max_tokens, request.failed, (), request.tenant
        )
        now = self._clock()
        slow = self.patience.left_out(now)
        spent: dict[str, float] = {}
        choice = self.stack.decide(bare, self._workers, columns, Dice(seed), slow, spent)
        choice.faults += slow.items()
        self.patience.note(spent, now)
        return Weighed(bare, columns, choice, self._workers, self._labels, seed, started)

    def settle(self, weighed: Weighed, waited: float = 0.0) -> Decision:
        """Make it the decision. :param waited: seconds that the request spent in a queue before. :raises AllBusy: and :raises NoWorker: as `route` does."""
        decision = self._record(weighed, dry_run=False, waited=waited)
        self._decided += 1
        if decision.worker is None:
            raise self._refusal(decision)
        for part in self._follow_decisions:
            try:
                part.component.chosen(decision.request, decision.worker)
            except Exception as e:
                self._fault(part.name, said(e))
        return decision

    def _record(self, weighed: Weighed, *, dry_run: bool, waited: float = 0.0) -> Decision:
        choice = weighed.choice
        self._recorded += 1
        decision = Decision(
            f"{self._prefix}-{self._recorded:x}", weighed.request, choice.worker, weighed.workers, weighed.labels, weighed.columns, choice.rejected,
            choice.candidates, choice.scores, choice.totals, choice.faults, weighed.seed, self.stack.hash, self.generation, self._wall(), dry_run,
            waited=waited,
        )
        for policy, what in choice.faults:
            self._fault(policy, what)
        self.ring.push(decision)
        self.observer.decided(decision, time.perf_counter() - weighed.started)
        return decision

    def _columns(self, request: RoutingRequest) -> Mapping[Fact[Any], Sequence[Any]]:
        workers = self._workers
        rows = len(workers)
        columns: dict[Fact[Any], Sequence[Any]] = {}
        for part in self._asked:
            try:
                given: Mapping[Fact[Any], Sequence[Any]] = part.component.columns(request, workers)
                for column in given.values():
                    if type(column) is not tuple or len(column) != rows:
                        given = {fact: _sealed(fact, column, rows) for fact, column in given.items()}
                        break
                columns.update(given)
            except Exception as e:
                self._fault(part.name, said(e))
        return columns

    def _seed_of(self, decision: int) -> int:
        return Dice((self._seed << 32) ^ decision).below(_MASK + 1)

    def _refusal(self, decision: Decision) -> NoWorker:
        what = f"model {self.model!r}" + (f" ({self.role})" if self.role != "aggregated" else "")
        now = self._clock()
        busy = any(by in self._busy for _, by, _ in decision.rejected) or any(m.busy and m.inhibited_until > now for m in self._members.values())
        return (AllBusy if busy else NoWorker)(what, decision.reasons() or ["no worker is registered"])

    def _fault(self, component: str, what: str) -> None:
        if not self.faults[component]:
            log.warning("%s broke its contract and is left out where it does: %s", component, what)
        self.faults[component] += 1
        self.observer.fault(component, what)

    # -------------------------------------------------------------- the fleet

    @property
    def workers(self) -> Sequence[Worker]:
        """Everyone who joined, ready or not, in row order."""
        return self._workers

    def label(self, worker: Worker) -> str:
        member = self._members.get(worker)
        return str(worker) if member is None else member.label

    def status(self) -> list[dict[str, Any]]:
        """Every worker with its health and all facts that this router knows of it, as plain data for people and programs."""
        now = self._clock()
        columns = self._columns(RoutingRequest("", self.model, role=self.role))
        return [
            {
                "worker": list(worker),
                "label": m.label,
                "proven": m.proven,
                "draining": m.draining,
                "inhibited": max(0.0, m.inhibited_until - now),
                "facts": {fact.name: _shown(column[row]) for fact, column in columns.items()},
            }
            for row, (worker, m) in enumerate((worker, self._members[worker]) for worker in self._workers)
        ]

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        """A worker is there. It gets requests once it is `proven`. One call for each data-parallel rank.

        Joining again brings another card; health and bookings stay.
        """
        label = instance.label + (f"/{worker.dp_rank}" if card.dp_size > 1 or worker.dp_rank else "")
        if (member := self._members.get(worker)) is None:
            self._members[worker] = _Member(instance, card, label)
        else:
            member.instance, member.card, member.label = instance, card, label
        self._renumber()
        self._tell(self._follow_fleet, lambda p: p.joined(worker, instance, card))
        self._say_health(worker)

    def left(self, worker: Worker) -> None:
        if self._members.pop(worker, None) is not None:
            self._renumber()
            self._tell(self._follow_fleet, lambda p: p.left(worker))
            self._changed()

    def proven(self, worker: Worker) -> None:
        """A canary request came back: the worker may serve."""
        if (member := self._members.get(worker)) is not None:
            member.proven = True
            self._say_health(worker)

    def draining(self, worker: Worker) -> None:
        """The worker is leaving: no new requests."""
        if (member := self._members.get(worker)) is not None:
            member.draining = True
            self._say_health(worker)

    def inhibit(self, worker: Worker, seconds: float, why: str, *, busy: bool = False) -> None:
        """Avoid the worker for a while; a longer inhibition that is already running stays. :param busy: it is well, and full."""
        if (member := self._members.get(worker)) is not None and (until := self._clock() + seconds) > member.inhibited_until:
            member.inhibited_until, member.why, member.busy = until, why, busy
            self._say_health(worker)

    def _say_health(self, worker: Worker) -> None:
        m = self._members[worker]
        self._changed()
        self._tell(self._follow_health, lambda p: p.health(worker, proven=m.proven, draining=m.draining, inhibited_until=m.inhibited_until, why=m.why))

    def _renumber(self) -> None:
        # In order of identity, so that equal fleets give equal rows, and the dice the same worker, whoever joined first.
        self._workers = tuple(sorted(self._members))
        self._labels = tuple(self._members[worker].label for worker in self._workers)

    # -------------------------------------------------------------- requests

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

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    # -------------------------------------------------------------- the queue

    def parked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        """`request` waits in the queue for `worker`: what is routed now comes after it."""
        for part in self._follow_queue:
            self._safely(part, part.component.parked, request, worker, overlap_tokens)

    def unparked(self) -> None:
        """Nothing waits, until `parked` says so again."""
        for part in self._follow_queue:
            self._safely(part, part.component.unparked)

    def all_busy(self, weighed: Weighed) -> bool:
        """Whether nobody could take it, and for want of capacity alone or in part."""
        return weighed.choice.worker is None and any(by in self._busy for _, by, _ in weighed.choice.rejected)

    # -------------------------------------------------------------- events

    def event_topics(self) -> frozenset[str]:
        """Topics below the model's component that the providers follow."""
        return frozenset(topic for part in self._follow_events for topic in part.component.topics)

    def on_event(self, topic: str, publisher: int, payload: bytes) -> None:
        for part in self._follow_events:
            if topic in part.component.topics:
                self._safely(part, part.component.on_event, topic, publisher, payload)

    def on_gap(self, topic: str, publisher: int, missed: int) -> None:
        for part in self._follow_events:
            if topic in part.component.topics:
                self._safely(part, part.component.on_gap, topic, publisher, missed)

    # -------------------------------------------------------------- the stack

    @property
    def providers(self) -> Sequence[Part]:
        """The providers of facts at work; a reload may change them."""
        return self._providers

    def swap(self, stack: Stack) -> None:
        """Decide by `stack` from now on. Providers that it has in common with the present one keep their state; new ones are told of the present."""
        kept = {(part.use, str(options_of(part.component))): part for part in self._providers}
        providers = tuple(kept.get((part.use, str(options_of(part.component))), part) for part in stack.providers)
        fresh = tuple(part for part in providers if part not in self._providers)
        for part in fresh:
            self._introduce(part)
        self.stack = stack
        self.generation += 1
        self._providers = providers
        # The last to write a column wins, so that the first provider is asked last.
        self._asked = providers[::-1]
        self._busy = frozenset(part.name for part in stack.filters if part.busy)
        self._follow_fleet = _those(providers, FollowsFleet)
        self._follow_health = _those(providers, FollowsHealth)
        self._follow_requests = _those(providers, FollowsRequests)
        self._follow_decisions = _those(providers, FollowsDecisions)
        self._follow_queue = _those(providers, FollowsQueue)
        self._follow_events = _those(providers, FollowsEvents)

    def _introduce(self, part: Part) -> None:
        provider = part.component
        if hasattr(provider, "clock"):
            self._safely(part, setattr, provider, "clock", self._clock)
        for worker, m in self._members.items():
            if isinstance(provider, FollowsFleet):
                self._safely(part, provider.joined, worker, m.instance, m.card)
            if isinstance(provider, FollowsHealth):
                self._tell((part,), lambda p, w=worker, m=m: p.health(w, proven=m.proven, draining=m.draining, inhibited_until=m.inhibited_until, why=m.why))
        if isinstance(provider, FollowsRequests):
            for (request_id, worker), booking in self._open.items():
                self._safely(part, provider.booked, booking.request, worker, booking.overlap_tokens)
                if booking.first:
                    self._safely(part, provider.first_token, request_id, worker, booking.cached_tokens)
                if booking.output_tokens:
                    self._safely(part, provider.grew, request_id, worker, booking.output_tokens)

    # -------------------------------------------------------------- providers that break

    def _tell(self, parts: Sequence[Part], say: Callable[[Any], None]) -> None:
        for part in parts:
            self._safely(part, say, part.component)

    def _safely(self, part: Part, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as e:
            self._fault(part.name, said(e))


def _those(parts: Sequence[Part], capability: type) -> tuple[Part, ...]:
    return tuple(part for part in parts if isinstance(part.component, capability))


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def _sealed(fact: Fact[Any], column: Any, rows: int) -> Sequence[Any]:
    if len(column) != rows:
        raise ValueError(f"{len(column)} values of {fact.name!r} for {rows} workers")
    if not hasattr(column, "setflags"):
        return tuple(column)
    column.setflags(write=False)
    return column
