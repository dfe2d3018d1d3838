"""The publishing side of the `zmq` plane: one socket for all topics of a process, advertised in discovery for each."""

from __future__ import annotations

import logging

import attrs
import msgspec
import zmq

from dynamo_core.discovery.contract import Discovery, Lease
from dynamo_core.errors import DynamoError
from dynamo_core.events.publishers import advert_prefix
from dynamo_core.events.zmq_wire import HEADER, LARGEST, Advert, Reader, topic_frame

log = logging.getLogger(__name__)


@attrs.define(eq=False)
class _Topic:
    frame: bytes
    next: int = 0
    """Never goes back while the process lives, so that publishing again after a close is no repetition."""
    publishers: int = 0


class ZmqPublisher:
    def __init__(self, outlet: Outlet, topic: str) -> None:
        self._outlet = outlet
        self._topic = topic
        self._open = True

    def publish(self, payload: bytes) -> int:
        return self._outlet.send(self._topic, payload)

    async def close(self) -> None:
        if self._open:
            self._open = False
            await self._outlet.withdraw(self._topic)


class Outlet:
    """Greets whoever subscribes with the number of the next event, so that a late or reconnected subscriber knows at once what it missed.

    `socket` is bound already, and peers reach it at `address`.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str, discovery: Discovery, lease: Lease) -> None:
        socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._socket = socket
        self._advert = msgspec.json.encode(Advert(address))
        self._discovery = discovery
        self._lease = lease
        self._topics: dict[str, _Topic] = {}
        self._reader = Reader(socket, self._subscribed)

    async def advertise(self, topic: str) -> ZmqPublisher:
        state = self._topics.setdefault(topic, _Topic(topic_frame(topic)))
        state.publishers += 1
        if state.publishers == 1:
            try:
                await self._discovery.put(self._key(topic), self._advert, self._lease)
            except BaseException:
                state.publishers -= 1
                raise
            self._greet(state)
        return ZmqPublisher(self, topic)

    async def withdraw(self, topic: str) -> None:
        state = self._topics[topic]
        state.publishers -= 1
        if state.publishers == 0:
            try:
                await self._discovery.delete(self._key(topic))
            except DynamoError as e:
                log.warning("left an advertisement to expire by itself", extra={"topic": topic, "because": str(e)})

    def send(self, topic: str, payload: bytes) -> int:
        """Number an event and send it. After the publisher was closed it is numbered, and lost."""
        if len(payload) > LARGEST:
            raise ValueError(f"an event of {topic!r} has {len(payload)} bytes, and {LARGEST} is the most")
        state = self._topics[topic]
        sequence = state.next
        state.next += 1
        if state.publishers and not self._socket.closed:
            self._transmit([state.frame, HEADER.pack(self._lease.id, sequence), payload])
        return sequence

    async def close(self) -> None:
        for topic, state in self._topics.items():
            if state.publishers:
                state.publishers = 1
                await self.withdraw(topic)
        self._reader.close()

    def _subscribed(self, frames: list[bytes]) -> None:
        if frames[0][:1] == b"\x01":
            state = self._topics.get(frames[0][1:-1].decode(errors="replace"))
            if state is not None and state.publishers:
                self._greet(state)

    def _greet(self, state: _Topic) -> None:
        self._transmit([state.frame, HEADER.pack(self._lease.id, state.next)])

    def _transmit(self, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            pass  # as lost as what a full queue drops; the numbers tell
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # pyright: ignore[reportOperatorIssue]
            self._reader.soon()

    def _key(self, topic: str) -> str:
        return f"{advert_prefix(topic)}{self._lease.id:x}"
