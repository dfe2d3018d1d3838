"""What etcd's JSON gateway answers. 64-bit numbers come as strings and bytes as base64; msgspec reads both."""

from __future__ import annotations

import msgspec


class Header(msgspec.Struct, frozen=True):
    revision: int = 0


class KeyValue(msgspec.Struct, frozen=True):
    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0
    lease: int = 0


class Answer(msgspec.Struct, frozen=True):
    """Of calls whose answer says no more than that they succeeded."""

    header: Header = Header()


class Found(Answer, frozen=True):
    kvs: list[KeyValue] = []
    more: bool = False


class Granted(Answer, frozen=True):
    ttl: int = msgspec.field(default=0, name="TTL")


class Remaining(Granted, frozen=True):
    """Seconds that a lease has left: 0 or less, and it is gone."""


class KeptAlive(msgspec.Struct, frozen=True):
    result: Remaining = Remaining()


class Token(Answer, frozen=True):
    token: str = ""


class Event(msgspec.Struct, frozen=True):
    kv: KeyValue
    type: str = "PUT"


class Watched(Answer, frozen=True):
    events: list[Event] = []
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0


class Fault(msgspec.Struct, frozen=True):
    message: str = ""
    code: int = 0
    grpc_code: int = 0


class WatchLine(msgspec.Struct, frozen=True):
    """One line of a watch."""

    result: Watched | None = None
    error: Fault | None = None


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b"\0"
