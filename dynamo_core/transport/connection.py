"""One connection of the `tcp` plane, as both of its ends see it: hello, frames in, frames out, pings, and being dropped."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import attrs
import msgspec

from dynamo_core.errors import Disconnected, ProtocolViolation
from dynamo_core.transport import frames
from dynamo_core.transport.frames import Failure, Frame, Hello, Ping, Pong, Splitter

log = logging.getLogger(__name__)

WRITE_BUFFER = 1024 * 1024
"""Bytes that may wait for the socket before nothing more is produced for it."""
_WRITELINES_PAUSES = not ((3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2))
"""asyncio's `writelines` forgot in these versions to say that the buffer is full (CVE-2024-12254). uvloop's never did."""
FAREWELL = 1.0
"""Seconds for which a dropped peer may still read why."""


@attrs.frozen
class Timing:
    """In seconds."""

    handshake: float
    ping_interval: float
    ping_timeout: float


class Connection(asyncio.Protocol):
    """Frames of one loop turn leave in one write; `received` gets what the peer sent, after its hello.

    Subclasses say what they do with a frame (`received`), with the end (`lost`), and with room to write (`writable`).
    """

    decoder: ClassVar[msgspec.msgpack.Decoder[Any]]
    role: ClassVar[str]
    """Of the peer, for log lines."""

    def __init__(self, offer: Hello, timing: Timing) -> None:
        self.offer = offer
        self.hello: Hello | None = None
        """What the peer can receive; `None` until it has said so."""
        self.connected = False
        self.closed = False
        self.paused = False
        """The socket takes no more for now."""
        self.peer = "?"
        self._loop = asyncio.get_running_loop()
        self._timing = timing
        self._splitter = Splitter(frames.MAX_HELLO)
        self._out: list[bytes | bytearray] = []
        self._flushing = False
        self._reason = ""
        self._heard = True
        self._pinged: float | None = None
        self._next_tick = 0.0
        self._sent = 0
        self._drained = 0
        """Of the bytes sent, those that the socket had taken at the last tick."""
        self._busy_until = 0
        """Bytes sent at the last tick."""
        self._timer: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    # ------------------------------------------------------------------ for subclasses

    def received(self, frame: Any) -> None:
        """A frame other than hello, ping and pong. :raises ProtocolViolation: it makes no sense; the peer is dropped."""
        raise NotImplementedError

    def greeted(self) -> None:
        """The peer has said hello, and speaks our version."""

    def lost(self, reason: str) -> None:
        """The connection is gone. Called once."""
        raise NotImplementedError

    def writable(self) -> None:
        """The socket takes more again."""

    def seal(self) -> None:
        """Append to `_out` what was collected in this loop turn."""

    # ------------------------------------------------------------------ out

    def post(self, frame: Frame) -> None:
        """Send a frame with whatever else becomes ready in this loop turn."""
        self._out.append(frames.encode(frame))
        self.schedule()

    def schedule(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self.closed:
            self._out.clear()
            return
        self.seal()
        if self._out:
            out, self._out = self._out, []
            self.write(out)

    def write(self, out: Sequence[bytes | bytearray]) -> None:
        self._sent += sum(map(len, out))
        if _WRITELINES_PAUSES:
            self.transport.writelines(out)
        else:
            self.transport.write(b"".join(out))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.writable()

    # ------------------------------------------------------------------ in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.connected = True
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        name = transport.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "?"
        self._timer = self._loop.call_later(self._timing.handshake, self._hello_overdue)
        self.write([frames.encode(self.offer)])

    def data_received(self, data: bytes) -> None:
        self._heard = True
        try:
            for body in self._splitter.feed(data):
                frame = self.decoder.decode(body)
                if self.hello is None:
                    self._greet(frame)
                elif type(frame) is Ping:
                    self.post(Pong())
                elif type(frame) is Failure and frame.stream == 0:
                    self._leave(frame.message)
                elif type(frame) is Hello:
                    raise ProtocolViolation("it said hello twice")
                elif type(frame) is not Pong:
                    self.received(frame)
                if self.closed:
                    return
        except ProtocolViolation as e:
            self.drop(str(e))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            self.drop(f"a frame does not decode: {e}")

    def _greet(self, hello: Any) -> None:
        if type(hello) is Failure and hello.stream == 0:
            self._leave(hello.message)
            return
        if type(hello) is not Hello or hello.magic != frames.MAGIC:
            raise ProtocolViolation("it did not say hello first")
        if hello.version != frames.VERSION:
            raise ProtocolViolation(f"it speaks version {hello.version} of the protocol, this side speaks {frames.VERSION}; run the same dynamo-core on both")
        self.hello = hello
        self._splitter.limit = self.offer.max_frame_bytes
        if self._timer is not None:
            self._timer.cancel()
        self._arm()
        self.greeted()

    # ------------------------------------------------------------------ the end

    def drop(self, reason: str) -> None:
        """Tell the peer why, say so in the log, and hang up."""
        if not self.closed:
            log.warning("dropped the %s at %s: %s", self.role, self.peer, reason)
            self.hang_up(reason)

    def hang_up(self, reason: str) -> None:
        """Send what is ready and close. A peer that does not read is cut off soon after."""
        if self.closed:
            return
        self.post(Failure(0, Disconnected.code, reason))
        self.flush()
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        self._reason = reason
        self._end()
        self.transport.close()
        self._farewell = self._loop.call_later(FAREWELL, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._farewell is not None:
            self._farewell.cancel()
        self._reason = self._reason or (str(exc) if exc else "the peer closed the connection")
        self._end()

    def _end(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.lost(self._reason)

    # ------------------------------------------------------------------ time

    def _hello_overdue(self) -> None:
        self.drop(f"it did not say hello within {self._timing.handshake:g} s")

    def _arm(self) -> None:
        self._next_tick = self._loop.time() + self._timing.ping_interval
        self._timer = self._loop.call_at(self._next_tick, self._tick)

    def _tick(self) -> None:
        """Ping a silent peer; drop one that stays silent."""
        now = self._loop.time()
        late = now - self._next_tick > self._timing.ping_interval  # it was this process that stood still: no evidence against the peer
        waiting = self.transport.get_write_buffer_size()
        moving = self._drained < self._busy_until and self._sent - waiting > self._drained  # it is still busy with what we sent before
        self._drained, self._busy_until = self._sent - waiting, self._sent
        if self._heard or late or moving:
            self._heard = False
            self._pinged = None
        elif self._pinged is None:
            self._pinged = now
            self.post(Ping())
        elif now - self._pinged >= self._timing.ping_timeout:
            self.drop(f"it did not answer a ping within {self._timing.ping_timeout:g} s")
            return
        self._arm()
