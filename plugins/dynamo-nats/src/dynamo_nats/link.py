"""A reliable byte stream between two processes, made of NATS messages: what the frames of the request plane travel on.

NATS delivers at most once. So messages are numbered, kept until the peer has acknowledged them, and sent again when the peer says that one is missing:
a connection to NATS that breaks and comes back costs a pause and not a stream. The window of unacknowledged bytes is the flow control: neither
NATS nor the peer is ever sent more than that.

A message is one byte of kind, the number of this message (or of the next one), the number that is expected of the peer, and data.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

HEADER = struct.Struct(">BQQ")
DATA, STATE, AGAIN, CLOSE, OPEN, GONE = range(6)
"""Data; only numbers; please send again; the end; hello; there is no such link here."""
WINDOW = 2 * 2**20
"""Bytes on the way and not acknowledged."""
_PIECE = 128 * 1024
"""Bytes of one message, unless the server allows less."""
_ACKNOWLEDGE = WINDOW // 4
"""Bytes received after which the peer is told without waiting for a heartbeat."""
_PATIENCE = 0.2
"""Seconds between two requests to send the same message again."""


class Carrier(Protocol):
    """What a link needs of its process's connection to NATS."""

    @property
    def up(self) -> bool: ...

    @property
    def largest(self) -> int: ...

    def send(self, subject: str, data: bytes, reply: str = "") -> None: ...


class Link(asyncio.Transport):
    """One end. `protocol` is told of the connection once the peer has answered."""

    def __init__(self, carrier: Carrier, name: str, protocol: asyncio.Protocol, lost_after: float, forget: Any) -> None:
        super().__init__({"peername": ("nats", name.rpartition(".")[2])})
        self.name = name
        """The subject on which the peer reaches us."""
        self.peer = ""
        self._carrier = carrier
        self._protocol = protocol
        self._lost_after = lost_after
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[memoryview] = deque()
        self._waiting_bytes = 0
        self._unacknowledged: deque[tuple[int, memoryview]] = deque()
        self._unacknowledged_bytes = 0
        self._next = 0
        self._expected = 0
        self._unreported = 0
        """Bytes received since the peer was last told."""
        self._asked = -_PATIENCE
        self._missing: float | None = None
        """Since when nobody is there."""
        self._said = 0.0
        self._high = WINDOW
        self._paused = False
        self._closing = False
        self._closed = False

    # ------------------------------------------------------------------ asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writelines((data,))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        whole = memoryview(b"".join(list_of_data))
        if self._closing or not whole:
            return
        piece = min(_PIECE, self._carrier.largest - HEADER.size)
        for start in range(0, len(whole), piece):
            self._waiting.append(whole[start : start + piece])
        self._waiting_bytes += len(whole)
        self._pump()
        if self._waiting_bytes > self._high and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self._waiting_bytes + self._unacknowledged_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = WINDOW if high is None else high

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Send what is ready, say goodbye, and do not wait for an answer."""
        if not self._closing:
            self._closing = True
            while self._waiting and self.peer:
                self._send_next()
            if self.peer:
                self._say(CLOSE)
            self._end(None)

    def abort(self) -> None:
        self._closing = True
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._closed:
            self._closed = True
            self._forget(self)
            self._waiting.clear()
            self._unacknowledged.clear()
            self._waiting_bytes = self._unacknowledged_bytes = 0
            self._loop.call_soon(self._protocol.connection_lost, error)

    def fail(self, because: str) -> None:
        """The link is broken."""
        self._closing = True
        self._end(ConnectionError(because))

    # ------------------------------------------------------------------ out

    def dial(self, subject: str) -> None:
        """Ask the server at `subject` for a link."""
        self._carrier.send(subject, HEADER.pack(OPEN, 0, 0), self.name)

    def connected(self, peer: str) -> None:
        self.peer = peer
        self._protocol.connection_made(self)

    def accept(self, peer: str) -> None:
        self.peer = peer
        self._say(STATE)
        self._protocol.connection_made(self)

    def _pump(self) -> None:
        while self._waiting and self.peer and self._unacknowledged_bytes < WINDOW:
            self._send_next()
        if self._paused and self._waiting_bytes <= self._high // 4:
            self._paused = False
            self._protocol.resume_writing()

    def _send_next(self) -> None:
        piece = self._waiting.popleft()
        self._waiting_bytes -= len(piece)
        self._unacknowledged.append((self._next, piece))
        self._unacknowledged_bytes += len(piece)
        self._transmit(self._next, piece)
        self._next += 1

    def _transmit(self, number: int, piece: memoryview) -> None:
        self._unreported = 0
        self._said = self._loop.time()
        self._carrier.send(self.peer, b"".join((HEADER.pack(DATA, number, self._expected), piece)), self.name)

    def _say(self, kind: int) -> None:
        self._unreported = 0
        self._said = self._loop.time()
        self._carrier.send(self.peer, HEADER.pack(kind, self._next, self._expected), self.name)

    def resend(self, start: int = 0) -> None:
        """Everything that is not acknowledged, from this number on, and our numbers."""
        for number, piece in self._unacknowledged:
            if number >= start:
                self._transmit(number, piece)
        self._say(STATE)

    def beat(self, silence: float) -> None:
        """Called regularly: tell the peer where we are, unless it was told within `silence` seconds."""
        if self.peer and (self._missing is not None or self._loop.time() - self._said >= silence):
            self._say(STATE)

    # ------------------------------------------------------------------ in

    def received(self, data: bytes, reply: str) -> None:
        """A message of the peer. :raises struct.error: it is not one."""
        kind, number, expected = HEADER.unpack_from(data)
        self._missing = None
        if kind == GONE:
            self.fail("the peer has no such link (any more)")
            return
        if not self.peer and reply:
            self.connected(reply)
        self._acknowledged(expected)
        if kind == DATA:
            self._take(number, data)
        elif number > self._expected:
            self._ask_again()
        if kind == AGAIN:
            self.resend(expected)
        elif kind == CLOSE:
            self._closing = True
            self._end(None)

    def _take(self, number: int, data: bytes) -> None:
        if number > self._expected:
            self._ask_again()
            return
        self._unreported += len(data)
        if number == self._expected:
            self._expected += 1
            self._protocol.data_received(data[HEADER.size :])
        if self._unreported >= _ACKNOWLEDGE and not self._closed:
            self._say(STATE)

    def _ask_again(self) -> None:
        now = self._loop.time()
        if now - self._asked >= _PATIENCE:
            self._asked = now
            self._say(AGAIN)

    def _acknowledged(self, expected: int) -> None:
        unacknowledged = self._unacknowledged
        while unacknowledged and unacknowledged[0][0] < expected:
            self._unacknowledged_bytes -= len(unacknowledged.popleft()[1])
        self._pump()

    def nobody(self) -> None:
        """NATS knows of nobody who would receive what we sent. The peer may be on its way back to NATS, so we ask a few times."""
        if not self.peer:
            self.fail("nobody answers there")
            return
        now = self._loop.time()
        if self._missing is None:
            self._missing = now
        elif now - self._missing >= self._lost_after:
            self.fail("the peer is gone from NATS")

    def carrier_is_back(self) -> None:
        self._missing = None
        if self.peer:
            self.resend()
