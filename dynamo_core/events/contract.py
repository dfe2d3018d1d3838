"""What every event plane must do: publish and subscribe, with a sequence number from each publisher.

    E1  Events of one publisher and topic arrive in the order in which they were published, none twice.
    E2  What was lost is known to be lost: the next event that arrives is preceded by a `Gap` that says how many.
        What a publisher sent before a subscriber reached it counts as missed too: numbers are compared from 0 on.
    E3  A subscriber finds publishers that start later, and drops those that leave (`Left`).
    E4  `publish` never blocks and never grows without bound: over the limit the oldest events are dropped and E2 applies.
    E5  A slow subscriber hurts neither the publisher nor other subscribers.
    E6  Topics are separate: nobody sees an event of a topic to which he did not subscribe.
    E7  A publisher that restarts has a new identity, and its sequence starts at 0.

The delivery guarantee is part of the type: a plane says `at-most-once` or `at-least-once`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol, runtime_checkable

import attrs

from dynamo_core.discovery.contract import Discovery, Lease


@attrs.frozen
class Event:
    publisher: int
    """The lease id of the publishing process."""
    sequence: int
    """Counts from 0 for each publisher and topic."""
    topic: str
    payload: bytes


@attrs.frozen
class Gap:
    """`missed` events of this publisher and topic were lost before the one that follows."""

    publisher: int
    topic: str
    missed: int


@attrs.frozen
class Left:
    """This publisher is gone."""

    publisher: int
    topic: str


Notice = Event | Gap | Left


@attrs.frozen
class EventContext:
    """What the runtime hands to a plane when it starts."""

    discovery: Discovery
    lease: Lease
    host: str = "127.0.0.1"
    """The address under which other machines reach this one."""


@runtime_checkable
class Publisher(Protocol):
    def publish(self, payload: bytes) -> int:
        """Send one event and return its sequence number. Does not block."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class Subscription(Protocol):
    """Iterate over what arrives; leave the context (or `close`) to stop."""

    def __aiter__(self) -> AsyncIterator[Notice]: ...

    async def close(self) -> None: ...


@runtime_checkable
class EventPlane(Protocol):
    guarantee: Literal["at-most-once", "at-least-once"]

    async def start(self, context: EventContext) -> None: ...

    async def publisher(self, topic: str) -> Publisher:
        """Topics are `/`-separated names such as `dynamo/backend/kv`."""
        ...

    async def subscribe(self, topic: str) -> Subscription:
        """Events of every publisher of exactly this topic, present and future."""
        ...

    async def stop(self) -> None: ...

    def problem(self) -> str | None:
        """What is wrong now, or `None`. Cached state; no I/O."""
        ...
