"""How a key becomes a file of `FileDiscovery`, and how its content proves to be whole.

One file for each pair of key and lease, named `<percent-encoded key>=<lease in hex>` (`=0` without a lease). That the lease
is part of the name is what fences: whatever an expired owner still writes, it can only touch its own dead files.
The content is one line of JSON (key, length and SHA-256 of the value) and then the value.
"""

from __future__ import annotations

import hashlib
from urllib.parse import quote

import attrs
import msgspec

_LONGEST_STEM = 200
"""File names end at 255 bytes; longer keys are cut and told apart by a digest."""


class _Header(msgspec.Struct, frozen=True):
    key: str
    size: int
    sha256: str


@attrs.frozen
class Record:
    key: str
    value: bytes
    lease: int | None


def stem(key: str) -> str:
    """What the names of all files of this key begin with, before the lease."""
    encoded = quote(key, safe="")
    if len(encoded) > _LONGEST_STEM:
        encoded = f"{encoded[:120]}={hashlib.sha256(key.encode()).hexdigest()[:32]}"
    return encoded


def file_name(key: str, lease: int | None) -> str:
    return f"{stem(key)}={lease or 0:x}"


def encode(key: str, value: bytes) -> bytes:
    header = _Header(key, len(value), hashlib.sha256(value).hexdigest())
    return msgspec.json.encode(header) + b"\n" + value


def decode(name: str, content: bytes) -> Record:
    """The record in a file. :raises ValueError: says what is wrong with it."""
    line, newline, value = content.partition(b"\n")
    if not newline:
        raise ValueError("it has no header line")
    try:
        header = msgspec.json.decode(line, type=_Header)
    except msgspec.DecodeError as e:
        raise ValueError(f"its header is not readable: {e}") from None
    if len(value) != header.size:
        raise ValueError(f"it has {len(value)} bytes of {header.size}")
    if hashlib.sha256(value).hexdigest() != header.sha256:
        raise ValueError("its checksum does not fit its content")
    of_key, _, lease = name.rpartition("=")
    if of_key != stem(header.key):
        raise ValueError(f"it is a record of {header.key!r} under a wrong name")
    try:
        return Record(header.key, value, int(lease, 16) or None)
    except ValueError:
        raise ValueError("its name does not end in a lease id") from None
