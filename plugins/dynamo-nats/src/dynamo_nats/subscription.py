"""The subscribing side of the `nats` event plane: one topic, and the publishers of it that discovery knows."""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable

from nats.aio.msg import Msg

from dynamo_core.discovery.contract import Discovery
from dynamo_core.events.contract import Event, Notice
from dynamo_core.events.inbox import Inbox
from dynamo_core.events.publishers import Publishers
from dynamo_nats.connection import Connection
from dynamo_nats.durable import DurableStream
from dynamo_nats.events_wire import EVENT, HEADER, Assembler
from dynamo_nats.stream import Replay

_EARLY = 512
"""Events that are kept of a publisher whom discovery has not told us about yet."""
_STRANGERS = 32
"""How many such publishers there may be."""

log = logging.getLogger(__name__)


class NatsSubscription:
    """Who is there, discovery says; so somebody who left is not heard again, and who is not registered is not heard at all."""

    def __init__(self, discovery: Discovery, topic: str, limit: int, call: Callable[[], None], on_close: Callable[[NatsSubscription], None]) -> None:
        self.topic = topic
        self.call = call
        """Ask all publishers of the topic to greet us."""
        self._on_close = on_close
        self._inbox = Inbox(limit)
        self._departed: deque[int] = deque(maxlen=4096)
        self._early: dict[int, deque[tuple[int, bytes | None]]] = {}
        self._assembler = Assembler()
        self._strange = 0
        self._closed = False
        self._publishers = Publishers(discovery, topic, self._joined, self._left)
        self._connection: Connection | None = None
        self._number: int | None = None
        self._replay: Replay | None = None

    async def open(self, connection: Connection, subject: str, stream: DurableStream | None) -> None:
        """Listen, and wait until the publishers that are there already have greeted us, or for a second."""
        if stream is None:
            self._connection = connection
            self._number = await connection.subscribe(subject, self.receive)
        else:
            self._replay = stream.replay(subject, self.receive)
        self.call()
        await self._publishers.heard()

    def __aiter__(self) -> NatsSubscription:
        return self

    async def __anext__(self) -> Notice:
        notice = await self._inbox.read()
        if notice is None:
            raise StopAsyncIteration
        return notice

    async def __aenter__(self) -> NatsSubscription:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.close()
        self._on_close(self)
        await self._publishers.close()
        number, self._number = self._number, None
        if number is not None and self._connection is not None:
            await self._connection.unsubscribe(number)
        replay, self._replay = self._replay, None
        if replay is not None:
            await replay.close()

    def problem(self) -> str | None:
        if trouble := self._publishers.trouble():
            return trouble
        silent, of = self._publishers.silent()
        if silent:
            names = ", ".join(f"{publisher:x}" for publisher in silent[:3])
            return f"no word from {len(silent)} of {of} publishers of {self.topic}: {names} (another NATS, or another prefix?)"
        return None

    def call_the_silent(self) -> None:
        if not self._publishers.all_greeted:
            self.call()

    # ------------------------------------------------------------------ who is there

    def _joined(self, publisher: int, key: str, value: bytes) -> bool:
        early = self._early.pop(publisher, ())
        for sequence, payload in early:
            self._hear(publisher, sequence, payload)
        if not early:
            self.call()
        return True

    def _left(self, publisher: int) -> None:
        self._departed.append(publisher)
        self._assembler.forget(publisher)
        self._inbox.left(publisher, self.topic)

    # ------------------------------------------------------------------ what they say

    def receive(self, message: Msg) -> None:
        try:
            kind, publisher, sequence, index, count = HEADER.unpack_from(message.data)
        except struct.error:
            self._strange += 1
            if self._strange == 1:
                log.warning("dropped a malformed event of %s; further ones are dropped silently", self.topic)
            return
        payload = None
        if kind == EVENT:
            payload = self._assembler.add(publisher, sequence, index, count, message.data[HEADER.size :])
            if payload is None:
                return
        if publisher in self._publishers:
            self._hear(publisher, sequence, payload)
        elif publisher not in self._departed:
            self._keep(publisher, sequence, payload)

    def _hear(self, publisher: int, sequence: int, payload: bytes | None) -> None:
        """An event, or without a payload the word that everything before it has been sent."""
        if payload is None:
            self._inbox.up_to(publisher, self.topic, sequence)
        else:
            self._inbox.push(Event(publisher, sequence, self.topic, payload))
        self._publishers.greeted(publisher)

    def _keep(self, publisher: int, sequence: int, payload: bytes | None) -> None:
        """NATS may be faster than discovery."""
        if publisher not in self._early and len(self._early) >= _STRANGERS:
            self._early.pop(next(iter(self._early)))
        self._early.setdefault(publisher, deque(maxlen=_EARLY)).append((sequence, payload))
