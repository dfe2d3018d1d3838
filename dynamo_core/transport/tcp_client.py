"""The calling end of a `tcp` connection: opens streams, and hands each one its part of every frame."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from dynamo_core.context import Context
from dynamo_core.errors import BodyTooLarge, CannotConnect, Disconnected, DynamoError, ProtocolViolation, RequestError, from_wire
from dynamo_core.transport import frames
from dynamo_core.transport.connection import Connection, Timing
from dynamo_core.transport.contract import Item
from dynamo_core.transport.frames import Cancel, Credit, Data, End, Failure, Hello, Open, Outputs, ToClient
from dynamo_core.transport.mailbox import Mailbox

READER_TIME = 200e-6
"""Seconds that one woken reader is given before readers of its connection are woken again."""
READERS_TIME = 8e-3
"""Seconds that all of them are given at most: shorter than a step of nearly every engine."""


class TcpStream(Mailbox):
    __slots__ = ("_bytes", "_channel", "_taken", "_taken_bytes", "id")

    def __init__(self, channel: TcpChannel, number: int) -> None:
        super().__init__()
        self.id = number
        self._channel = channel
        self._taken = 0
        self._taken_bytes = 0

    def taken(self, items: Sequence[Item]) -> None:
        """Grant credit in portions of half a window: a short stream costs no frame at all."""
        self._taken += len(items)
        if isinstance(items[0], bytes):
            self._taken_bytes += sum(len(item) for item in items if isinstance(item, bytes))
        offer = self._channel.offer
        if self._taken * 2 >= offer.window_items or self._taken_bytes * 2 >= offer.window_bytes:
            if not self._finished:
                self._channel.post(Credit(self.id, self._taken, self._taken_bytes))
            self._taken = self._taken_bytes = 0

    def cancelled(self) -> None:
        self._channel.forget(self.id)


class TcpChannel(Connection):
    decoder = frames.to_client
    role = "worker"

    def __init__(self, address: str, offer: Hello, timing: Timing) -> None:
        super().__init__(offer, timing)
        self.address = address
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._streams: dict[int, TcpStream] = {}
        self._last = 0
        self._parked: dict[int, bytearray] = {}
        """Opens that wait for the socket to take what it was given before."""
        self._held: dict[TcpStream, None] = {}
        """Readers with something to read that are not woken yet."""
        self._next_wake = 0.0
        self._waking: asyncio.TimerHandle | None = None

    def open(self, endpoint: str, payload: bytes, context: Context) -> TcpStream:
        self._last += 1
        stream = TcpStream(self, self._last)
        if self.closed:
            stream.finish(Disconnected(f"the connection to {self.address} is gone: {self._reason}"))
            return stream
        try:
            frame = frames.encode(Open(stream.id, endpoint, payload, context.id, context.remaining(), context.priority,
                                       context.session, context.tenant, context.traceparent))
        except (TypeError, ValueError, OverflowError) as e:
            stream.finish(RequestError(f"request {context.id} cannot be sent: {e}"))
            return stream
        limit = self.hello.max_frame_bytes if self.hello else 0
        if len(frame) - frames.HEADER > limit:
            stream.finish(BodyTooLarge(f"request {context.id} is {len(frame)} bytes on the wire, and {self.address} takes at most {limit}"))
            return stream
        stream.follow(context)
        if context.cancelled:
            return stream
        self._streams[stream.id] = stream
        if self.paused:
            self._parked[stream.id] = frame
        else:
            self._out.append(frame)
            self.schedule()
        return stream

    def forget(self, number: int) -> None:
        """The caller cancelled: what still arrives is dropped."""
        if self._streams.pop(number, None) is not None and self._parked.pop(number, None) is None and not self.closed:
            self.post(Cancel(number))

    async def close(self) -> None:
        if self.connected:
            self.hang_up("the caller closed the connection")

    # ------------------------------------------------------------------ Connection

    def received(self, frame: ToClient) -> None:
        streams = self._streams
        if type(frame) is Outputs:
            if len(frame.streams) != len(frame.outputs):
                raise ProtocolViolation("an outputs frame has columns of different length")
            held = self._held
            for number, output in zip(frame.streams, frame.outputs, strict=True):
                if (stream := streams.get(number)) is not None:
                    if stream.add(output):
                        held[stream] = None
                elif number > self._last:
                    raise ProtocolViolation(f"it sent an output of stream {number}, which was never opened")
            if held:
                self._wake_readers()
        elif type(frame) is Data:
            if (stream := streams.get(frame.stream)) is not None:
                stream.put(frame.item)
        elif type(frame) is End:
            self._finish(frame.stream, None)
        elif type(frame) is Failure:
            self._finish(frame.stream, from_wire(frame.code, frame.message))

    def _wake_readers(self) -> None:
        """At once after a pause. An engine that steps faster than readers can follow fills their mailboxes meanwhile, and each reads several
        outputs at a time: without this, the faster an engine is, the more a token costs."""
        if self._waking is None:
            early = self._next_wake - time.monotonic()
            if early > 0:
                self._waking = self._loop.call_later(early, self._wake_held)
            else:
                self._wake_held()

    def _wake_held(self) -> None:
        self._waking = None
        held, self._held = self._held, {}
        self._next_wake = time.monotonic() + min(READERS_TIME, READER_TIME * len(held))
        for stream in held:
            stream.wake()

    def _finish(self, number: int, error: DynamoError | None) -> None:
        if (stream := self._streams.pop(number, None)) is not None:
            self._parked.pop(number, None)
            stream.finish(error)

    def greeted(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def writable(self) -> None:
        while self._parked and not self.paused:
            self.write([self._parked.pop(next(iter(self._parked)))])

    def lost(self, reason: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(CannotConnect(f"{self.address}: {reason}"))
        streams, self._streams = self._streams, {}
        self._parked.clear()
        self._held.clear()
        if self._waking is not None:
            self._waking.cancel()
        for stream in streams.values():
            stream.finish(Disconnected(f"the connection to {self.address} was lost: {reason}"))
