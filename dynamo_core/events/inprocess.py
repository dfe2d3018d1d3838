"""Events inside one process: for tests and for stacks that run in one process."""

from __future__ import annotations

import asyncio
from typing import Literal
from weakref import WeakKeyDictionary

import attrs
from attrs import validators as v

from dynamo_core.events.contract import Event, EventContext, Notice
from dynamo_core.events.inbox import Inbox


@attrs.define(eq=False)
class _Topic:
    """What all planes of one name and one event loop share about a topic."""

    next: dict[int, int] = attrs.field(factory=dict)
    """Of each publisher that is there."""
    inboxes: set[Inbox] = attrs.field(factory=set)


_topics: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], _Topic]] = WeakKeyDictionary()


class InProcessPublisher:
    def __init__(self, plane: InProcessEvents, topic: str) -> None:
        self._plane = plane
        self._topic = topic

    def publish(self, payload: bytes) -> int:
        return self._plane.send(self._topic, payload)

    async def close(self) -> None:
        self._plane.drop(self)


class InProcessSubscription:
    def __init__(self, topic: str, shared: _Topic, limit: int) -> None:
        self._shared = shared
        self._inbox = Inbox(limit)
        for publisher, sequence in shared.next.items():
            self._inbox.up_to(publisher, topic, sequence)
        shared.inboxes.add(self._inbox)

    def __aiter__(self) -> InProcessSubscription:
        return self

    async def __anext__(self) -> Notice:
        notice = await self._inbox.read()
        if notice is None:
            raise StopAsyncIteration
        return notice

    async def __aenter__(self) -> InProcessSubscription:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._shared.inboxes.discard(self._inbox)
        self._inbox.close()


@attrs.define(eq=False)
class InProcessEvents:
    """An event plane shared by everybody who starts the same `name` on one event loop."""

    name: str = "default"
    receive_queue: int = attrs.field(default=100_000, validator=v.ge(1))
    """Events that wait for one slow subscriber; past that it loses the oldest and is told so."""

    guarantee: Literal["at-most-once"] = attrs.field(init=False, default="at-most-once", repr=False)
    _context: EventContext | None = attrs.field(init=False, default=None, repr=False)
    _sequences: dict[str, int] = attrs.field(init=False, factory=dict, repr=False)
    _publishers: dict[InProcessPublisher, str] = attrs.field(init=False, factory=dict, repr=False)
    _subscriptions: list[InProcessSubscription] = attrs.field(init=False, factory=list, repr=False)

    async def start(self, context: EventContext) -> None:
        self._context = context
        self._sequences.clear()

    async def publisher(self, topic: str) -> InProcessPublisher:
        me = self._started().lease.id
        publisher = InProcessPublisher(self, topic)
        self._publishers[publisher] = topic
        # Publishing again under the same identity continues the numbers, so that nobody mistakes new events for old ones.
        self._shared(topic).next[me] = self._sequences.setdefault(topic, 0)
        return publisher

    async def subscribe(self, topic: str) -> InProcessSubscription:
        self._started()
        subscription = InProcessSubscription(topic, self._shared(topic), self.receive_queue)
        self._subscriptions.append(subscription)
        return subscription

    async def stop(self) -> None:
        for publisher in list(self._publishers):
            self.drop(publisher)
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        self._context = None

    def problem(self) -> str | None:
        return None

    def send(self, topic: str, payload: bytes) -> int:
        """Number an event and hand it to everybody. After the publisher was closed it is numbered, and lost."""
        sequence = self._sequences.get(topic, 0)
        self._sequences[topic] = sequence + 1
        context = self._context
        if context is not None and topic in self._publishers.values():
            shared = self._shared(topic)
            shared.next[context.lease.id] = sequence + 1
            event = Event(context.lease.id, sequence, topic, bytes(payload))
            for inbox in shared.inboxes:
                inbox.push(event)
        return sequence

    def drop(self, publisher: InProcessPublisher) -> None:
        """Withdraw a publisher. With the last of its topic, we have left."""
        topic = self._publishers.pop(publisher, None)
        if topic is not None and topic not in self._publishers.values():
            shared, me = self._shared(topic), self._started().lease.id
            shared.next.pop(me, None)
            for inbox in shared.inboxes:
                inbox.left(me, topic)

    def _shared(self, topic: str) -> _Topic:
        return _topics.setdefault(asyncio.get_running_loop(), {}).setdefault((self.name, topic), _Topic())

    def _started(self) -> EventContext:
        if self._context is None:
            raise RuntimeError("the in-process event plane is used before start() or after stop()")
        return self._context
