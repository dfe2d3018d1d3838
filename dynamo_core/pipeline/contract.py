"""What the frontend sees of the fleet: models that are ready, and generations that can be read.

The HTTP surface knows nothing of workers, planes or migration; it starts a generation and reads deltas until the end.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.preprocess.contract import Preprocessor
from dynamo_core.types import Delta, LogprobText, Request, TextOptions, Usage


@runtime_checkable
class Generation(Protocol):
    """One request on its way. Reading drives it; whoever stops reading early must call `cancel`."""

    @property
    def usage(self) -> Usage:
        """Exact at any time for what has been read."""
        ...

    @property
    def decisions(self) -> Sequence[str]:
        """Ids of the routing decisions made for it so far, for the `x-dynamo-decision` header and `dynamo explain`."""
        ...

    @property
    def workers(self) -> Sequence[str]:
        """Labels of the workers that served it, in order."""
        ...

    @property
    def prompt_logprobs(self) -> Sequence[LogprobText | None] | None:
        """Known once the first delta was read."""
        ...

    async def read(self) -> Sequence[Delta]:
        """At least one delta, at most one for each choice; an empty sequence is the end.

        :raises DynamoError: typed; `status`, `code` and the message are fit for the client.
        """
        ...

    def cancel(self, reason: str = "client disconnected") -> None: ...


class DeltaSink(Protocol):
    """Where deltas go that need no decision: to a client that takes them at once."""

    @property
    def ready(self) -> Callable[[], bool]:
        """Whether `take` may be called now. While the client is behind it may not: deltas are read then, as fast as the client takes them."""
        ...

    def take(self, deltas: Sequence[Delta]) -> None: ...


class Pouring(abc.ABC):
    """A generation that can spare its reader a wake-up for each token. Optional: without it, everything is read."""

    @abc.abstractmethod
    def pour(self, sink: DeltaSink) -> None:
        """From now on, while `read` waits, give deltas to `sink` in the callback that brings their tokens. First outputs, finish reasons and
        errors are read; so is everything that comes while the sink is not ready."""
        ...


@runtime_checkable
class Model(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def card(self) -> ModelCard: ...

    @property
    def preprocessor(self) -> Preprocessor: ...

    @property
    def created(self) -> int:
        """Unix time at which this frontend first saw the model; it does not change from call to call."""
        ...

    def not_ready(self) -> str | None:
        """What is still missing, in a sentence, or `None`."""
        ...

    def lost(self) -> str | None:
        """Why nobody can take a request now although workers are registered: all of them have just failed. `None` when somebody is well."""
        ...

    async def start(self, request: Request, text: TextOptions, context: Context) -> Generation:
        """Check, route and dispatch. :raises DynamoError: nothing was sent to the client yet, so the status is still free."""
        ...

    async def route(self, request: Request, context: Context) -> str:
        """Dry run: decide as `start` would, dispatch nothing, book nothing. Returns the id of the decision."""
        ...


@runtime_checkable
class Catalog(Protocol):
    def get(self, name: str) -> Model:
        """:raises ModelNotFound: nobody ever offered it. :raises Unavailable: it is known but not ready, with what is missing."""
        ...

    def models(self) -> Sequence[Model]:
        """Ready models, by name."""
        ...

    def not_ready(self) -> str | None:
        """Why this frontend serves nothing, in a sentence, or `None` when at least one model is ready."""
        ...

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        """A decision record rendered for people and programs (see `routing.record`), while the ring still holds it.

        Also found by request id: the latest decision of that request.
        """
        ...

    def decisions(self, limit: int, since: float) -> list[dict[str, Any]]:
        """The latest decisions since a Unix time, newest first: id, request, time, worker, outcome."""
        ...

    def routers(self) -> dict[str, Any]:
        """Each worker as each router sees it, with all facts, by `model/role`."""
        ...

    def status(self) -> dict[str, Any]:
        """Models, workers, planes and degraded states, for `/health` and `/debug/fleet`."""
        ...


@runtime_checkable
class Chained(Protocol):
    """A catalog whose workers may decide in their turn, as a global router does. Optional."""

    async def further(self, decision_id: str) -> list[dict[str, Any]]:
        """The decisions that followed this one elsewhere, in order, each rendered as by `Catalog.decision`."""
        ...


@runtime_checkable
class Holding(Protocol):
    """Where requests wait for a model that has no worker, or none that is well."""

    def known(self, name: str) -> str | None:
        """The model's own name, if it is one that requests may wait for."""
        ...

    def cold(self) -> Sequence[str]:
        """Names of models that have no worker and can have one."""
        ...

    async def wait(self, name: str) -> Model:
        """:raises Unavailable: nobody came in time. :raises AllBusy: too many wait already."""
        ...
