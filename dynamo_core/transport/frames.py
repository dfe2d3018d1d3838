"""The frames of the `tcp` plane: what they are, and how a byte stream is cut into them.

A frame is a 4-byte big-endian length and that many bytes of msgpack: an array that starts with the kind. Each direction has its own
decoder, so that a frame which may not travel that way does not decode.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from dynamo_core.errors import ProtocolViolation
from dynamo_core.types import Output

VERSION = 1
MAGIC = "dynamo"
HEADER = 4
"""Bytes of the length."""
MAX_HELLO = 4096
"""Bytes. Until the peer has said hello, it may not make us buffer more."""


class Hello(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """The first frame, both ways. What follows `version` is what the sender is ready to receive."""

    magic: str = MAGIC
    version: int = VERSION
    max_frame_bytes: int = 64 * 2**20
    max_streams: int = 65536
    window_items: int = 1024
    """Items of one stream that may be on the way or unread."""
    window_bytes: int = 4 * 2**20
    """The same in bytes, of streams that carry bytes; one item may exceed it."""


class Open(msgspec.Struct, array_like=True, tag=2, gc=False):
    stream: int
    endpoint: str
    payload: bytes
    request: str
    remaining: float | None = None
    """Seconds until the deadline: clocks of two machines do not agree."""
    priority: int = 0
    session: str | None = None
    tenant: str | None = None
    traceparent: str | None = None


class Outputs(msgspec.Struct, array_like=True, tag=3, gc=False):
    """What one engine step added to many streams: `outputs[i]` belongs to `streams[i]`."""

    streams: list[int]
    outputs: list[Output]


class Data(msgspec.Struct, array_like=True, tag=4, gc=False):
    """One item of a stream that carries bytes."""

    stream: int
    item: bytes


class End(msgspec.Struct, array_like=True, tag=5, gc=False):
    stream: int


class Failure(msgspec.Struct, array_like=True, tag=6, gc=False):
    """The stream ended badly. Stream 0 is the connection: the sender drops it, and says why."""

    stream: int
    code: str
    message: str


class Cancel(msgspec.Struct, array_like=True, tag=7, gc=False):
    stream: int


class Credit(msgspec.Struct, array_like=True, tag=8, gc=False):
    """The reader has taken this much; as much again may follow."""

    stream: int
    items: int
    bytes: int


class Ping(msgspec.Struct, array_like=True, tag=9, gc=False):
    pass


class Pong(msgspec.Struct, array_like=True, tag=10, gc=False):
    pass


ToServer = Hello | Open | Cancel | Credit | Ping | Pong | Failure
ToClient = Outputs | Data | End | Failure | Hello | Ping | Pong
Frame = ToServer | ToClient

_encoder = msgspec.msgpack.Encoder()
to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
to_client: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)


def encode(frame: Frame) -> bytearray:
    """The frame as it goes on the wire, its length included."""
    buffer = bytearray(HEADER)
    _encoder.encode_into(frame, buffer, HEADER)
    buffer[:HEADER] = (len(buffer) - HEADER).to_bytes(HEADER, "big")
    return buffer


class Splitter:
    """Cuts a byte stream into frame bodies, however it was chunked."""

    __slots__ = ("_buffer", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Bytes of one frame; checked before the frame is buffered."""
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> Iterator[memoryview]:
        """The bodies that are complete now. Use each one before asking for the next.

        :raises ProtocolViolation: a frame is over the limit.
        """
        buffer = self._buffer
        if buffer:
            buffer += chunk
            source: bytes | bytearray = buffer
        else:
            source = chunk
        position, available = 0, len(source)
        try:
            with memoryview(source) as view:
                while available - position >= HEADER:
                    size = int.from_bytes(view[position : position + HEADER], "big")
                    if size > self.limit:
                        raise ProtocolViolation(f"a frame of {size} bytes is over the limit of {self.limit}{_guess(bytes(view[position : position + HEADER]))}")
                    end = position + HEADER + size
                    if end > available:
                        break
                    with view[position + HEADER : end] as body:
                        yield body
                    position = end
        finally:
            if source is buffer:
                del buffer[:position]
            elif position < available:
                buffer += chunk[position:] if position else chunk

    @property
    def buffered(self) -> int:
        return len(self._buffer)


def _guess(start: bytes) -> str:
    """Who talks to us, when the length makes no sense."""
    if start[0] == 0x16 and start[1] == 0x03:
        return " (this looks like TLS: is `tls` configured on one side only?)"
    if start in (b"GET ", b"POST", b"PUT ", b"HEAD", b"HTTP", b"OPTI", b"DELE", b"PRI "):
        return " (this looks like HTTP)"
    return ""
