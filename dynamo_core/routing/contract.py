"""What a routing policy sees and what it must do: columns in, columns out, no I/O.

A policy never sees worker objects. It sees a `Fleet`: the candidate workers of one decision as rows, and the facts about
them as columns. Filters return reasons, scorers return one value per row, a picker picks a row. All of them are
synchronous and pure over their inputs; whatever has state (bookings, the KV index) is a fact provider.

    R1  Facts are declared: `needs` lists what a policy reads, and reading anything else raises `UndeclaredFact`.
    R2  A scorer returns one finite number for each row; higher is better. `scale = "unit"` means 0 to 1 (values outside
        are clamped); `scale = "raw"` means any unit, such as milliseconds saved, which the scorer documents.
    R3  The order of rows means nothing: permuting the fleet permutes the scores.
    R4  Inputs are not written to.
    R5  A filter names the rows that must not serve the request, each with a reason; it never adds rows.
    R6  Randomness comes from the `Dice` alone, so that a recorded decision repeats exactly.
    R7  A policy that raises, or returns the wrong length or not-a-number, is skipped for that decision and counted
        under its name; the request goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import attrs

from dynamo_core.cards import ModelCard, Role
from dynamo_core.errors import UndeclaredFact
from dynamo_core.types import Hints, Instance

if TYPE_CHECKING:
    from dynamo_core.events.contract import Publisher, Subscription

T = TypeVar("T")


class Worker(NamedTuple):
    """A row of the fleet: one data-parallel rank of one instance."""

    instance: int
    dp_rank: int = 0

    def __str__(self) -> str:
        return f"{self.instance & 0xFFFFFF:06x}" + (f"/{self.dp_rank}" if self.dp_rank else "")


@attrs.frozen(eq=False)
class Fact(Generic[T]):
    """A named, typed measurement of every worker. Two facts are one fact when their names agree."""

    name: str
    type: type[T]
    unit: str = "1"
    doc: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fact) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


@attrs.frozen
class RoutingRequest:
    """What policies may know about a request."""

    id: str
    model: str
    token_ids: Sequence[int] = ()
    """The prompt, for fact providers; a `dynamo_core.kv.prehashed.Prehashed` where only the keys of its blocks are known.
    Policies see it empty (its length is `prompt_tokens`), and `cache_salt` likewise, so
    that every decision can be recomputed from its record, which holds neither."""
    prompt_tokens: int = 0
    role: Role = "aggregated"
    """Which kind of worker is wanted."""
    hints: Hints = attrs.field(default=Hints())
    adapter: str | None = None
    cache_salt: str | None = None
    max_tokens: int | None = None
    failed: tuple[Worker, ...] = ()
    """Workers that have already failed this request."""
    media: Sequence[Mapping[str, Any]] = ()
    """What the prompt holds besides text, for fact providers; policies see it empty."""
    tenant: str | None = None
    """On whose behalf, when it is known."""
    prefills: bool = True
    """Whether the worker computes the prompt: not where another one does and only its KV blocks come, nor where images alone are read.
    For queues and fact providers; policies, which have `role`, see it unset."""


class Fleet:
    """The candidate workers of one decision: `fleet[FACT]` is a column, row i belongs to `fleet.workers[i]`."""

    __slots__ = ("_columns", "_needs", "_policy", "workers")

    def __init__(
        self, workers: Sequence[Worker], columns: Mapping[Fact[Any], Sequence[Any]], policy: str = "", needs: frozenset[Fact[Any]] | None = None
    ) -> None:
        self.workers = workers
        self._columns = columns
        self._policy = policy
        self._needs = needs

    def __len__(self) -> int:
        return len(self.workers)

    def __getitem__(self, fact: Fact[T]) -> Sequence[T]:
        if self._needs is not None and fact not in self._needs:
            raise UndeclaredFact(self._policy, fact.name)
        return self._columns[fact]

    @property
    def columns(self) -> Mapping[Fact[Any], Sequence[Any]]:
        """The columns that may be read, read-only."""
        return MappingProxyType(self._columns if self._needs is None else {fact: self._columns[fact] for fact in self._needs if fact in self._columns})

    def seen_by(self, policy: str, needs: frozenset[Fact[Any]]) -> Fleet:
        """The same rows, confined to the facts that `policy` declared."""
        return Fleet(self.workers, self._columns, policy, needs)

    def take(self, rows: Sequence[int]) -> Fleet:
        """These rows alone, in this order."""
        columns = {fact: _take(column, rows) for fact, column in self._columns.items()}
        return Fleet(tuple([self.workers[i] for i in rows]), columns, self._policy, self._needs)


def _take(column: Any, rows: Sequence[int]) -> Sequence[Any]:
    if not hasattr(column, "setflags"):
        return tuple([column[i] for i in rows])
    part = column[list(rows)]
    part.setflags(write=False)
    return part


class Dice:
    """The randomness of one decision, repeatable from its seed (splitmix64)."""

    __slots__ = ("_state", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._state = seed & 0xFFFFFFFFFFFFFFFF

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """A whole number from 0 to n-1, each as likely."""
        return (self._next() * n) >> 64

    def uniform(self) -> float:
        """A float in [0, 1)."""
        return (self._next() >> 11) * 2.0**-53


# ------------------------------------------------------------------ what plugins implement


@runtime_checkable
class Filter(Protocol):
    needs: Sequence[Fact[Any]]

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        """`{row: reason}` for each worker that must not serve this request.

        A filter with the class attribute `busy = True` rejects for want of capacity alone: when nobody else objects, the
        client is told to come back (529) and not that there is no worker (503).
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    needs: Sequence[Fact[Any]]

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        """One score per row, higher is better (R2). The optional attribute `scale` is `"unit"` (default) or `"raw"`."""
        ...


@runtime_checkable
class Picker(Protocol):
    """`needs` is optional here, as most pickers look at totals only."""

    def pick(self, totals: Sequence[float], fleet: Fleet, dice: Dice) -> int:
        """The chosen row. `totals` is never empty."""
        ...


@runtime_checkable
class Preset(Protocol):
    """A named stack: kind `policy`, for users who want one word in their configuration."""

    def stack(self) -> Mapping[str, Any]:
        """A `[router]` table: `{"filters": [...], "scorers": [...], "picker": {...}}`."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A whole policy: kind `policy`, for those that do not fit filter, score and pick."""

    needs: Sequence[Fact[Any]]

    def choose(self, request: RoutingRequest, fleet: Fleet, dice: Dice) -> tuple[int, Sequence[float]]:
        """The chosen row, and a value for each row that explains the choice (higher is better)."""
        ...


# ------------------------------------------------------------------ where facts come from


@runtime_checkable
class FactProvider(Protocol):
    """A source of facts; holds whatever state they need. Kind `facts`.

    A stack starts only when each fact that it needs is provided. Providers of needed facts are started on demand.
    One that has an attribute `clock` gets the router's: a function that returns seconds, which virtual time replaces.
    """

    provides: Sequence[Fact[Any]]

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Mapping[Fact[Any], Sequence[Any]]:
        """A column, one entry for each worker, for every fact provided. Synchronous: it is on the request path.

        A column is kept in the decision record, so it must never change afterwards: a tuple (the same one may be returned
        again), a fresh list, or a fresh numpy array.
        """
        ...


@runtime_checkable
class FollowsFleet(Protocol):
    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None: ...

    def left(self, worker: Worker) -> None: ...


@runtime_checkable
class FollowsHealth(Protocol):
    """Each call says the present state of the worker anew."""

    def health(self, worker: Worker, *, proven: bool, draining: bool, inhibited_until: float, why: str) -> None:
        """`inhibited_until` is in seconds of the router's clock; 0 when the worker is not inhibited."""
        ...


@runtime_checkable
class FollowsDecisions(Protocol):
    def chosen(self, request: RoutingRequest, worker: Worker) -> None:
        """This router chose `worker`; dry runs are not told."""
        ...


@runtime_checkable
class FollowsRequests(Protocol):
    """Bookings. For one request: `booked`, then `first_token`, `grew`..., then `finished` exactly once for each `booked`."""

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None: ...

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        """`output_tokens` have been generated so far. Called at block boundaries, not for each token."""
        ...

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None: ...


@runtime_checkable
class NamesPrompts(Protocol):
    """A provider that can tell other frontends which prompt is meant without the prompt, so that a booking of theirs counts like one made here."""

    def named(self, request: RoutingRequest) -> Sequence[int]:
        """What stands for `token_ids` in bookings elsewhere: a `dynamo_core.kv.prehashed.Prehashed`, or nothing."""
        ...


@runtime_checkable
class SharesState(Protocol):
    """A provider whose like in other frontends should know what it knows. Bookings are told anyway; this is for a newcomer that heard none."""

    def state(self) -> Sequence[bytes]:
        """Messages that bring another one up to date, each of at most some 100 kB."""
        ...

    def learn(self, message: bytes) -> None:
        """What another one knew. It may come twice, and late."""
        ...


@runtime_checkable
class FollowsQueue(Protocol):
    """The router's queue looks through what waits, again and again; each look starts with `unparked`."""

    def parked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        """The request waits for `worker`, before everything that is routed until the next look."""
        ...

    def unparked(self) -> None:
        """Nothing waits for anybody: a new look begins."""
        ...


@runtime_checkable
class FollowsEvents(Protocol):
    topics: Sequence[str]
    """Last parts of event-plane topics, such as `load` or `kv`; the runtime subscribes below the model's component."""

    def on_event(self, topic: str, publisher: int, payload: bytes) -> None: ...

    def on_gap(self, topic: str, publisher: int, missed: int) -> None: ...


@runtime_checkable
class Attached(Protocol):
    """A provider that talks to the fleet: it asks workers, or shares what it knows with other routers.

    Where there is no fleet, in virtual time, nobody calls these, and the provider must do without.
    """

    async def attach(self, surroundings: Surroundings) -> None:
        """The router begins its work. It is not waited for: decisions may be made before this returns."""
        ...

    async def detach(self) -> None:
        """The router ends, or its stack changed: stop every task. Called once for each `attach`, even one that failed."""
        ...


@runtime_checkable
class Reports(Protocol):
    def problems(self) -> Mapping[str, str]:
        """Degraded states by name, for `/health`; empty when all is well. Cached state, no I/O."""
        ...


class Surroundings(Protocol):
    """The fleet as a provider may use it. Topics are below the model's component, as in `FollowsEvents.topics`."""

    @property
    def id(self) -> int:
        """Of this process: its lease, and what it publishes under. It may change when the lease is lost."""
        ...

    @property
    def namespace(self) -> str: ...

    @property
    def component(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def role(self) -> Role: ...

    async def call(self, instance: Instance, endpoint: str, payload: bytes, *, timeout: float) -> list[bytes]:
        """Ask an endpoint beside the one that generates. :raises DynamoError: typed. :raises TimeoutError: no answer in time."""
        ...

    async def publisher(self, topic: str) -> Publisher: ...

    async def subscribe(self, topic: str) -> Subscription: ...

    async def secret(self, name: str) -> bytes:
        """A secret that the whole namespace shares. :raises StoreUnavailable: it cannot be had now."""
        ...
