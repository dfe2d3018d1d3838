"""What travels between the ends of the `zmq` plane, and how a ZeroMQ socket is read on an event loop.

A message has the frames `topic NUL`, publisher and sequence number (two unsigned 64-bit integers, big endian), and the payload.
Without a payload it is a greeting: "I am here, and my next event has this number".
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

import msgspec
import zmq

HEADER = struct.Struct(">QQ")
LARGEST = 64 * 2**20
"""Bytes of one event."""
_NOBLOCK = int(zmq.NOBLOCK)
_BURST = 512
"""Messages that are read in one turn of the loop."""


class Advert(msgspec.Struct, frozen=True):
    """What a publisher puts in discovery at `v1/events/<topic>/<publisher>`."""

    address: str


def topic_frame(topic: str) -> bytes:
    """ZeroMQ matches by prefix; the NUL at the end makes that an exact match."""
    return topic.encode() + b"\0"


class Reader:
    """Calls `receive` with the frames of each message, on the event loop.

    The descriptor of a ZeroMQ socket tells of changes once, and any other call on the socket may swallow that: so whoever
    uses the socket otherwise calls `soon` afterwards.
    """

    def __init__(self, socket: zmq.Socket[bytes], receive: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._descriptor: int = socket.getsockopt(zmq.FD)  # pyright: ignore[reportAttributeAccessIssue]
        self._scheduled: asyncio.Handle | None = None
        self._loop.add_reader(self._descriptor, self._drain)
        self.soon()

    def soon(self) -> None:
        if self._scheduled is None:
            self._scheduled = self._loop.call_soon(self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._scheduled is not None:
            self._scheduled.cancel()
        self._socket.close(linger=0)

    def _drain(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        socket = self._socket
        for _ in range(_BURST):
            if socket.closed:
                return
            try:
                frame = socket.recv(_NOBLOCK, copy=False)
            except zmq.Again:
                return
            # Not `recv_multipart`, which takes longer to ask whether there is more than to read it.
            frames = [frame.bytes]
            while frame.more:
                frame = socket.recv(_NOBLOCK, copy=False)
                frames.append(frame.bytes)
            self._receive(frames)
        self.soon()
