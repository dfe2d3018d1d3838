"""What travels between the ends of the `nats` event plane.

A message is a header and a piece of a payload: kind, publisher, number of the event, which piece of how many. A greeting has no
payload: "my next event has this number".
"""

from __future__ import annotations

import struct
from urllib.parse import quote

HEADER = struct.Struct(">BQQHH")
EVENT, GREETING = range(2)
LARGEST = 64 * 2**20
"""Bytes of one event."""
_ROOM = 256
"""Bytes of a message that are left for NATS's own headers."""


def token_path(topic: str) -> str:
    """A topic as tokens of a NATS subject: `ns/backend/kv` is `ns.backend.kv`, and what a token may not contain is escaped."""
    return ".".join(quote(part, safe="").replace(".", "%2E") or "%" for part in topic.split("/"))


def pieces(publisher: int, sequence: int, payload: bytes, largest: int) -> list[bytes]:
    """The messages of one event, none of them larger than `largest` bytes."""
    size = largest - HEADER.size - _ROOM
    if len(payload) <= size:
        return [HEADER.pack(EVENT, publisher, sequence, 0, 1) + payload]
    count = -(-len(payload) // size)
    return [HEADER.pack(EVENT, publisher, sequence, i, count) + payload[i * size : (i + 1) * size] for i in range(count)]


class Assembler:
    """Puts the pieces of the events of many publishers together again. An event of which a piece is missing never comes out."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[int, list[bytes]]] = {}

    def add(self, publisher: int, sequence: int, index: int, count: int, piece: bytes) -> bytes | None:
        """The whole payload, once its last piece is here."""
        if count == 1:
            return piece
        if index == 0:
            self._parts[publisher] = sequence, [piece]
            return None
        begun = self._parts.get(publisher)
        if begun is None or begun[0] != sequence or len(begun[1]) != index:
            self._parts.pop(publisher, None)
            return None
        begun[1].append(piece)
        if len(begun[1]) < count:
            return None
        del self._parts[publisher]
        return b"".join(begun[1])

    def forget(self, publisher: int) -> None:
        self._parts.pop(publisher, None)
