"""The subscribing side of the `zmq` plane: finds the publishers of one topic in discovery and listens to each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import attrs
import msgspec
import zmq

from dynamo_core.discovery.contract import Delete, Discovery, Put, Resync, Synced
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError
from dynamo_core.events.contract import Event, Notice
from dynamo_core.events.inbox import Inbox
from dynamo_core.events.zmq_wire import HEADER, LARGEST, Advert, Reader, advert_prefix, topic_frame

_GREETINGS = 1.0
"""Seconds for which `subscribe` waits for those publishers that are there already."""
_SILENT = 5.0
"""Seconds without a greeting after which a publisher counts as unreachable."""

log = logging.getLogger(__name__)


@attrs.define
class _Peer:
    address: str
    since: float
    greeted: bool = False


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
        self._discovery = discovery
        self._on_close = on_close
        self._inbox = Inbox(limit)
        self._peers: dict[int, _Peer] = {}
        self._synced = False
        self._ready = asyncio.Event()
        self._trouble: str | None = None
        self._strange = 0
        self._loop = asyncio.get_running_loop()
        self._reader = Reader(socket, self._receive)
        self._follow = asyncio.create_task(self._follow_publishers(), name=f"events: publishers of {topic}")

    async def connected(self) -> None:
        """Wait until the publishers that are there already have greeted us, or for a second."""
        try:
            async with asyncio.timeout(_GREETINGS):  # wait_for may swallow a cancellation
                await self._ready.wait()
        except TimeoutError:
            pass  # `problem` names whom we miss

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
            await ended(self._follow)

    def problem(self) -> str | None:
        if self._trouble:
            return self._trouble
        now = self._loop.time()
        silent = [peer.address for peer in self._peers.values() if not peer.greeted and now - peer.since > _SILENT]
        if silent:
            return f"no answer from {len(silent)} of {len(self._peers)} publishers of {self.topic}: {', '.join(silent[:3])} (a firewall, or another CURVE key?)"
        return None

    # ------------------------------------------------------------------ who is there

    async def _follow_publishers(self) -> None:
        unseen: set[int] = set()
        prefix = advert_prefix(self.topic)
        try:
            async with self._discovery.watch(prefix) as changes:
                async for change in changes:
                    match change:
                        case Put(key, value):
                            if (publisher := _publisher(key, prefix)) is not None:
                                unseen.discard(publisher)
                                self._joined(publisher, key, value)
                        case Delete(key):
                            if (publisher := _publisher(key, prefix)) is not None:
                                self._left(publisher)
                        case Resync():
                            unseen = set(self._peers)
                        case Synced():
                            for publisher in unseen:
                                self._left(publisher)
                            unseen = set()
                            self._synced = True
                            self._check_ready()
        except DynamoError as e:
            self._trouble = f"no longer finds publishers of {self.topic}: {e}"
            log.warning("lost sight of publishers", extra={"topic": self.topic, "because": str(e)})

    def _joined(self, publisher: int, key: str, value: bytes) -> None:
        try:
            address = msgspec.json.decode(value, type=Advert).address
            before = self._peers.get(publisher)
            if before is not None and before.address == address:
                return
            self._socket.connect(address)
        except (msgspec.DecodeError, zmq.ZMQError) as e:
            log.warning("skipped an unusable publisher", extra={"key": key, "because": str(e)})
            return
        if before is not None:
            self._socket.disconnect(before.address)
        self._peers[publisher] = _Peer(address, self._loop.time())
        self._reader.soon()

    def _left(self, publisher: int) -> None:
        peer = self._peers.pop(publisher, None)
        if peer is not None:
            self._socket.disconnect(peer.address)
            self._reader.soon()
            self._inbox.left(publisher, self.topic)
            self._check_ready()

    def _check_ready(self) -> None:
        if self._synced and all(peer.greeted for peer in self._peers.values()):
            self._ready.set()

    # ------------------------------------------------------------------ what they say

    def _receive(self, frames: list[bytes]) -> None:
        if not 2 <= len(frames) <= 3 or frames[0] != self._frame or len(frames[1]) != HEADER.size:
            self._strange += 1
            if self._strange == 1:
                log.warning("dropped a malformed event; further ones are dropped silently", extra={"topic": self.topic, "frames": [len(f) for f in frames[:4]]})
            return
        publisher, sequence = HEADER.unpack(frames[1])
        peer = self._peers.get(publisher)
        if peer is None:
            return  # it has left, and does not come back under that name
        if len(frames) == 3:
            self._inbox.push(Event(publisher, sequence, self.topic, frames[2]))
            return
        self._inbox.up_to(publisher, self.topic, sequence)
        if not peer.greeted:
            peer.greeted = True
            self._check_ready()


def _publisher(key: str, prefix: str) -> int | None:
    """Whose advertisement this is; `None` for one of another topic that begins alike."""
    try:
        return int(key.removeprefix(prefix), 16)
    except ValueError:
        return None
