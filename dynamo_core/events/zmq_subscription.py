"""The subscribing side of the `zmq` plane: finds the publishers of one topic in discovery and listens to each."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
import zmq

from dynamo_core.discovery.contract import Discovery
from dynamo_core.events.contract import Event, Notice
from dynamo_core.events.inbox import Inbox
from dynamo_core.events.publishers import Publishers
from dynamo_core.events.zmq_wire import HEADER, LARGEST, Advert, Reader, topic_frame

log = logging.getLogger(__name__)


class ZmqSubscription:
    def __init__(self, socket: zmq.Socket[bytes], discovery: Discovery, topic: str, limit: int, on_close: Callable[[ZmqSubscription], None]) -> None:
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        socket.setsockopt(zmq.HEARTBEAT_IVL, 5000)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15000)
        socket.setsockopt(zmq.SUBSCRIBE, topic_frame(topic))
        self.topic = topic
        self._frame = topic_frame(topic)
        self._socket = socket
        self._on_close = on_close
        self._inbox = Inbox(limit)
        self._addresses: dict[int, str] = {}
        self._strange = 0
        self._reader = Reader(socket, self._receive)
        self._publishers = Publishers(discovery, topic, self._joined, self._left)

    async def connected(self) -> None:
        """Wait until the publishers that are there already have greeted us, or for a second."""
        await self._publishers.heard()

    def __aiter__(self) -> ZmqSubscription:
        return self

    async def __anext__(self) -> Notice:
        notice = await self._inbox.read()
        if notice is None:
            raise StopAsyncIteration
        return notice

    async def __aenter__(self) -> ZmqSubscription:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        if not self._socket.closed:
            self._reader.close()
            self._inbox.close()
            self._on_close(self)
            await self._publishers.close()

    def problem(self) -> str | None:
        if trouble := self._publishers.trouble():
            return trouble
        silent, of = self._publishers.silent()
        if silent:
            addresses = ", ".join(self._addresses[publisher] for publisher in silent[:3])
            return f"no answer from {len(silent)} of {of} publishers of {self.topic}: {addresses} (a firewall, or another CURVE key?)"
        return None

    # ------------------------------------------------------------------ who is there

    def _joined(self, publisher: int, key: str, value: bytes) -> bool:
        try:
            address = msgspec.json.decode(value, type=Advert).address
            before = self._addresses.get(publisher)
            if before == address:
                return True
            self._socket.connect(address)
        except (msgspec.DecodeError, zmq.ZMQError) as e:
            log.warning("skipped an unusable publisher", extra={"key": key, "because": str(e)})
            return False
        if before is not None:
            self._socket.disconnect(before)
        self._addresses[publisher] = address
        self._reader.soon()
        return True

    def _left(self, publisher: int) -> None:
        self._socket.disconnect(self._addresses.pop(publisher))
        self._reader.soon()
        self._inbox.left(publisher, self.topic)

    # ------------------------------------------------------------------ what they say

    def _receive(self, frames: list[bytes]) -> None:
        if not 2 <= len(frames) <= 3 or frames[0] != self._frame or len(frames[1]) != HEADER.size:
            self._strange += 1
            if self._strange == 1:
                log.warning("dropped a malformed event; further ones are dropped silently", extra={"topic": self.topic, "frames": [len(f) for f in frames[:4]]})
            return
        publisher, sequence = HEADER.unpack(frames[1])
        if publisher not in self._publishers:
            return  # it has left, and does not come back under that name
        if len(frames) == 3:
            self._inbox.push(Event(publisher, sequence, self.topic, frames[2]))
            return
        self._inbox.up_to(publisher, self.topic, sequence)
        self._publishers.greeted(publisher)
