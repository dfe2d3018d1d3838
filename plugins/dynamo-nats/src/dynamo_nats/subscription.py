"""The subscribing side of the `nats` event plane: one topic, and the publishers of it that discovery knows."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable

import attrs
from nats.aio.msg import Msg

from dynamo_core.discovery.contract import Delete, Discovery, Put, Resync, Synced
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError
from dynamo_core.events.contract import Event, Notice
from dynamo_core.events.inbox import Inbox
from dynamo_nats.connection import Connection
from dynamo_nats.durable import DurableStream
from dynamo_nats.events_wire import EVENT, HEADER, Assembler, advert_prefix
from dynamo_nats.stream import Replay

_GREETINGS = 1.0
"""Seconds for which `subscribe` waits for those publishers that are there already."""
_SILENT = 5.0
"""Seconds without a word after which a publisher counts as unreachable."""
_EARLY = 512
"""Events that are kept of a publisher whom discovery has not told us about yet."""
_STRANGERS = 32
"""How many such publishers there may be."""

log = logging.getLogger(__name__)


@attrs.define
class _Peer:
    since: float
    greeted: bool = False


class NatsSubscription:
    """Who is there, discovery says; so somebody who left is not heard again, and who is not registered is not heard at all."""

    def __init__(self, discovery: Discovery, topic: str, limit: int, call: Callable[[], None], on_close: Callable[[NatsSubscription], None]) -> None:
        self.topic = topic
        self.call = call
        """Ask all publishers of the topic to greet us."""
        self._discovery = discovery
        self._on_close = on_close
        self._inbox = Inbox(limit)
        self._peers: dict[int, _Peer] = {}
        self._departed: deque[int] = deque(maxlen=4096)
        self._early: dict[int, deque[tuple[int, bytes | None]]] = {}
        self._assembler = Assembler()
        self._synced = asyncio.Event()
        self._ready = asyncio.Event()
        self._trouble: str | None = None
        self._strange = 0
        self._loop = asyncio.get_running_loop()
        self._follow = asyncio.create_task(self._follow_publishers(), name=f"events: publishers of {topic}")
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
        try:
            async with asyncio.timeout(_GREETINGS):  # wait_for may swallow a cancellation
                await self._ready.wait()
        except TimeoutError:
            pass  # `problem` names whom we miss

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
        if self._follow.done() and self._number is None and self._replay is None:
            return
        self._inbox.close()
        self._on_close(self)
        await ended(self._follow)
        number, self._number = self._number, None
        if number is not None and self._connection is not None:
            await self._connection.unsubscribe(number)
        replay, self._replay = self._replay, None
        if replay is not None:
            await replay.close()

    def problem(self) -> str | None:
        if self._trouble:
            return self._trouble
        now = self._loop.time()
        silent = [f"{publisher:x}" for publisher, peer in self._peers.items() if not peer.greeted and now - peer.since > _SILENT]
        if silent:
            return f"no word from {len(silent)} of {len(self._peers)} publishers of {self.topic}: {', '.join(silent[:3])} (another NATS, or another prefix?)"
        return None

    def call_the_silent(self) -> None:
        if not all(peer.greeted for peer in self._peers.values()):
            self.call()

    # ------------------------------------------------------------------ who is there

    async def _follow_publishers(self) -> None:
        unseen: set[int] = set()
        prefix = advert_prefix(self.topic)
        try:
            async with self._discovery.watch(prefix) as changes:
                async for change in changes:
                    match change:
                        case Put(key):
                            if (publisher := _publisher(key, prefix)) is not None:
                                unseen.discard(publisher)
                                self._joined(publisher)
                        case Delete(key):
                            if (publisher := _publisher(key, prefix)) is not None:
                                self._left(publisher)
                        case Resync():
                            unseen = set(self._peers)
                        case Synced():
                            for publisher in unseen:
                                self._left(publisher)
                            unseen = set()
                            self._synced.set()
                            self._check_ready()
        except DynamoError as e:
            self._trouble = f"no longer finds publishers of {self.topic}: {e}"
            log.warning("lost sight of publishers of %s: %s", self.topic, e)

    def _joined(self, publisher: int) -> None:
        if publisher not in self._peers:
            self._peers[publisher] = _Peer(self._loop.time())
            early = self._early.pop(publisher, ())
            for sequence, payload in early:
                self._hear(publisher, sequence, payload)
            if not early:
                self.call()

    def _left(self, publisher: int) -> None:
        if self._peers.pop(publisher, None) is not None:
            self._departed.append(publisher)
            self._assembler.forget(publisher)
            self._inbox.left(publisher, self.topic)
            self._check_ready()

    def _check_ready(self) -> None:
        if self._synced.is_set() and all(peer.greeted for peer in self._peers.values()):
            self._ready.set()

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
        if publisher in self._peers:
            self._hear(publisher, sequence, payload)
        elif publisher not in self._departed:
            self._keep(publisher, sequence, payload)

    def _hear(self, publisher: int, sequence: int, payload: bytes | None) -> None:
        """An event, or without a payload the word that everything before it has been sent."""
        if payload is None:
            self._inbox.up_to(publisher, self.topic, sequence)
        else:
            self._inbox.push(Event(publisher, sequence, self.topic, payload))
        peer = self._peers[publisher]
        if not peer.greeted:
            peer.greeted = True
            self._check_ready()

    def _keep(self, publisher: int, sequence: int, payload: bytes | None) -> None:
        """NATS may be faster than discovery."""
        if publisher not in self._early and len(self._early) >= _STRANGERS:
            self._early.pop(next(iter(self._early)))
        self._early.setdefault(publisher, deque(maxlen=_EARLY)).append((sequence, payload))


def _publisher(key: str, prefix: str) -> int | None:
    """Whose advertisement this is; `None` for one of another topic that begins alike."""
    try:
        return int(key.removeprefix(prefix), 16)
    except ValueError:
        return None
