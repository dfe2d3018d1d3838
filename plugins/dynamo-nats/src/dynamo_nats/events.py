"""Events through NATS: at most once, or, with `durable`, kept in JetStream and replayed."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal

import attrs
import msgspec
from attrs import validators as v

from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError
from dynamo_core.events.contract import EventContext
from dynamo_core.events.publishers import advert_prefix
from dynamo_nats.connection import Connection, NatsOptions
from dynamo_nats.durable import DurableStream
from dynamo_nats.events_wire import GREETING, HEADER, LARGEST, pieces, token_path
from dynamo_nats.subscription import NatsSubscription

log = logging.getLogger(__name__)

_TICK = 1.0
"""Seconds between two rounds of greetings: how soon it is known that a publisher's last event was lost."""


@attrs.define(eq=False)
class _Topic:
    next: int = 0
    """Never goes back while the process lives, so that publishing again after a close is no repetition."""
    publishers: int = 0
    greeted: int = -1
    """The number that subscribers were told last."""
    hello: int | None = None
    """Our subscription to the calls of new subscribers."""


class NatsPublisher:
    def __init__(self, plane: NatsEvents, topic: str) -> None:
        self._plane = plane
        self._topic = topic
        self._open = True

    def publish(self, payload: bytes) -> int:
        return self._plane.send(self._topic, payload)

    async def close(self) -> None:
        if self._open:
            self._open = False
            await self._plane.withdraw(self._topic)


@attrs.define(eq=False, kw_only=True)
class NatsEvents(NatsOptions):
    """Every topic is a subject. Losses are known by their numbers; with `durable` there are none within what the stream keeps."""

    send_queue: int = attrs.field(default=100_000, validator=v.ge(1))
    """Messages that wait while NATS is away or slow; past that the oldest are dropped, and subscribers are told so."""
    receive_queue: int = attrs.field(default=100_000, validator=v.ge(1))
    """Events that wait for one slow subscriber; past that it loses the oldest and is told so."""
    durable: bool = False
    """Keep events in a JetStream stream: subscribers that come late or were away are sent what they missed."""
    keep_events: int = attrs.field(default=10_000, validator=v.ge(1))
    """With `durable`: messages that the stream keeps of each topic."""
    keep_seconds: float = attrs.field(default=3600.0, validator=v.gt(0), metadata={"duration": True})
    """With `durable`: how long it keeps them."""
    replicas: int = attrs.field(default=1, validator=[v.ge(1), v.le(5)])
    """With `durable`: servers that hold the stream; 3 in a cluster that may lose one."""

    guarantee: Literal["at-most-once", "at-least-once"] = attrs.field(init=False, default="at-most-once", repr=False)
    _context: EventContext | None = attrs.field(init=False, default=None, repr=False)
    _connection: Connection | None = attrs.field(init=False, default=None, repr=False)
    _stream: DurableStream | None = attrs.field(init=False, default=None, repr=False)
    _topics: dict[str, _Topic] = attrs.field(init=False, factory=dict, repr=False)
    _subscriptions: set[NatsSubscription] = attrs.field(init=False, factory=set, repr=False)
    _ticking: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.durable:
            self.guarantee = "at-least-once"

    # ------------------------------------------------------------------ contract

    async def start(self, context: EventContext) -> None:
        """:raises ConfigError: NATS does not let us in. :raises ConnectionError: it does not answer."""
        self._topics.clear()
        connection = Connection(self, f"dynamo-events-{context.lease.id:x}", self.send_queue)
        await connection.open()
        try:
            if self.durable:
                self._stream = DurableStream(connection, self.prefix, self.send_queue, self.keep_events, self.keep_seconds, self.replicas)
                await self._stream.open()
        except BaseException:
            await connection.close()
            raise
        connection.on_up.append(self._back)
        self._context = context
        self._connection = connection
        self._ticking = asyncio.create_task(self._tick(), name="nats events: greetings")

    async def publisher(self, topic: str) -> NatsPublisher:
        context, connection = self._started()
        state = self._topics.setdefault(topic, _Topic())
        state.publishers += 1
        if state.publishers == 1:
            try:
                if state.hello is None:
                    state.hello = await connection.subscribe(self._hello(topic), lambda _: self._greet(topic, state))
                await context.discovery.put(self._key(topic), msgspec.json.encode({"address": f"nats:{self._subject(topic)}"}), context.lease)
            except BaseException:
                state.publishers -= 1
                raise
            self._greet(topic, state)
        return NatsPublisher(self, topic)

    async def subscribe(self, topic: str) -> NatsSubscription:
        context, connection = self._started()
        subscription = NatsSubscription(context.discovery, topic, self.receive_queue, lambda: connection.send(self._hello(topic), b""), self._unsubscribe)
        self._subscriptions.add(subscription)
        try:
            await subscription.open(connection, self._subject(topic), self._stream)
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def stop(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        for topic, state in self._topics.items():
            if state.publishers:
                state.publishers = 1
                await self.withdraw(topic)
        await ended(self._ticking)
        if self._stream is not None:
            await self._stream.close()
            self._stream = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def problem(self) -> str | None:
        if self._connection is None:
            return None
        found = [self._connection.problem(), self._stream.problem() if self._stream else None, *(s.problem() for s in self._subscriptions)]
        return "; ".join(problem for problem in found if problem) or None

    # ------------------------------------------------------------------ publishing

    def send(self, topic: str, payload: bytes) -> int:
        """Number an event and send it. After the publisher was closed it is numbered, and lost."""
        if len(payload) > LARGEST:
            raise ValueError(f"an event of {topic!r} has {len(payload)} bytes, and {LARGEST} is the most")
        state = self._topics[topic]
        sequence = state.next
        state.next += 1
        connection, context = self._connection, self._context
        if state.publishers and connection is not None and context is not None:
            carrier = self._stream or connection
            for message in pieces(context.lease.id, sequence, payload, connection.largest):
                carrier.send(self._subject(topic), message)
        return sequence

    async def withdraw(self, topic: str) -> None:
        state = self._topics[topic]
        state.publishers -= 1
        if state.publishers == 0 and self._context is not None:
            if state.hello is not None and self._connection is not None:
                await self._connection.unsubscribe(state.hello)
                state.hello = None
            try:
                await self._context.discovery.delete(self._key(topic))
            except DynamoError as e:
                log.warning("left an advertisement to expire by itself: %s: %s", topic, e)

    def _greet(self, topic: str, state: _Topic) -> None:
        if state.publishers and self._connection is not None and self._context is not None:
            state.greeted = state.next
            (self._stream or self._connection).send(self._subject(topic), HEADER.pack(GREETING, self._context.lease.id, state.next, 0, 1))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            for topic, state in self._topics.items():
                if self._stream is None and state.greeted != state.next:
                    self._greet(topic, state)
            for subscription in self._subscriptions:
                subscription.call_the_silent()

    def _back(self) -> None:
        """NATS was away: nobody knows what was lost until both sides have compared numbers."""
        for topic, state in self._topics.items():
            self._greet(topic, state)
        for subscription in self._subscriptions:
            subscription.call()

    # ------------------------------------------------------------------ names

    def _unsubscribe(self, subscription: NatsSubscription) -> None:
        self._subscriptions.discard(subscription)

    def _subject(self, topic: str) -> str:
        return f"{self.prefix}.events.{token_path(topic)}"

    def _hello(self, topic: str) -> str:
        return f"{self.prefix}.hello.{token_path(topic)}"

    def _key(self, topic: str) -> str:
        assert self._context is not None
        return f"{advert_prefix(topic)}{self._context.lease.id:x}"

    def _started(self) -> tuple[EventContext, Connection]:
        if self._context is None or self._connection is None:
            raise RuntimeError("the nats event plane is used before start() or after stop()")
        return self._context, self._connection
