"""The fact providers of one router: they are asked for columns, told what happens, and left out where they break."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dynamo_core.routing.contract import Fact, FollowsEvents, FollowsQueue, NamesPrompts, RoutingRequest, SharesState, Worker
from dynamo_core.routing.decide import Part, blamed, options_of
from dynamo_core.routing.record import Decision

log = logging.getLogger(__name__)


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


class Unobserved:
    """The observer of a router that nobody watches."""

    def decided(self, decision: Decision, seconds: float) -> None: ...

    def fault(self, component: str, what: str) -> None: ...

    def found(self, decision: Decision, cached_tokens: int | None) -> None: ...


class Sources:
    """What routing rests on; `Roster` tells it of the fleet, and `Bookings` of requests."""

    def __init__(self, *, observer: Observer | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """:param clock: seconds, also for the providers. Virtual time replaces it."""
        self.observer: Observer = observer or Unobserved()
        self.faults: Counter[str] = Counter()
        """How often each policy and provider was left out."""
        self._clock = clock
        self._workers: tuple[Worker, ...] = ()
        self._providers: tuple[Part, ...] = ()
        self._asked: tuple[Part, ...] = ()
        self._follow_queue: tuple[Part, ...] = ()
        self._follow_events: tuple[Part, ...] = ()
        self._name_prompts: tuple[Part, ...] = ()
        self._share_state: tuple[Part, ...] = ()

    @property
    def providers(self) -> Sequence[Part]:
        """The providers of facts at work; a reload may change them."""
        return self._providers

    def replace(self, wanted: Sequence[Part]) -> None:
        """Use these from now on. Those that are like one at work keep its state; new ones are told of the present."""
        kept = {(part.use, str(options_of(part.component))): part for part in self._providers}
        providers = tuple(kept.get((part.use, str(options_of(part.component))), part) for part in wanted)
        for part in providers:
            if part not in self._providers:
                self._introduce(part)
        self._providers = providers
        # The last to write a column wins, so that the first provider is asked last.
        self._asked = providers[::-1]
        self._follow_queue = self._those(FollowsQueue)
        self._follow_events = self._those(FollowsEvents)
        self._name_prompts = self._those(NamesPrompts)
        self._share_state = self._those(SharesState)

    def _introduce(self, part: Part) -> None:
        if hasattr(part.component, "clock"):
            self._safely(part, setattr, part.component, "clock", self._clock)

    def _those(self, capability: type) -> tuple[Part, ...]:
        return tuple(part for part in self._providers if isinstance(part.component, capability))

    # -------------------------------------------------------------- asked

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
            except BaseException as e:
                self._fault(part.name, blamed(e))
        return columns

    # -------------------------------------------------------------- told of the queue

    def parked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        """`request` waits in the queue for `worker`: what is routed now comes after it."""
        for part in self._follow_queue:
            self._safely(part, part.component.parked, request, worker, overlap_tokens)

    def unparked(self) -> None:
        """Nothing waits, until `parked` says so again."""
        for part in self._follow_queue:
            self._safely(part, part.component.unparked)

    # -------------------------------------------------------------- told of events

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

    # -------------------------------------------------------------- told to other frontends, and by them

    def named(self, request: RoutingRequest) -> Sequence[int]:
        """What stands for the prompt of `request` in other frontends; empty when no provider can say."""
        for part in self._name_prompts:
            try:
                return part.component.named(request)
            except BaseException as e:
                self._fault(part.name, blamed(e))
        return ()

    def state(self) -> list[tuple[str, bytes]]:
        """Messages for the providers of a router that is new: under which name the provider is registered, and what it says."""
        found: list[tuple[str, bytes]] = []
        for part in self._share_state:
            try:
                found += [(part.use, message) for message in part.component.state()]
            except BaseException as e:
                self._fault(part.name, blamed(e))
        return found

    def learn(self, use: str, message: bytes) -> None:
        """What the provider registered as `use` knows in another frontend."""
        for part in self._share_state:
            if part.use == use:
                self._safely(part, part.component.learn, message)

    # -------------------------------------------------------------- those that break

    def _tell(self, parts: Sequence[Part], say: Callable[[Any], None]) -> None:
        for part in parts:
            self._safely(part, say, part.component)

    def _safely(self, part: Part, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except BaseException as e:
            self._fault(part.name, blamed(e))

    def _fault(self, component: str, what: str) -> None:
        if not self.faults[component]:
            log.warning("%s broke its contract and is left out where it does: %s", component, what)
        self.faults[component] += 1
        self.observer.fault(component, what)


def _sealed(fact: Fact[Any], column: Any, rows: int) -> Sequence[Any]:
    if len(column) != rows:
        raise ValueError(f"{len(column)} values of {fact.name!r} for {rows} workers")
    if not hasattr(column, "setflags"):
        return tuple(column)
    column.setflags(write=False)
    return column
