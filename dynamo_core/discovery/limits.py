"""What a key and a value may be, checked alike by every store."""

from __future__ import annotations

MAX_KEY = 512
"""Characters."""
MAX_VALUE = 2**20
"""Bytes."""


def check_key(key: str) -> None:
    """:raises ValueError: the key is empty, longer than `MAX_KEY`, or not printable ASCII."""
    if not key or len(key) > MAX_KEY or not (key.isascii() and key.isprintable()):
        raise ValueError(f"a discovery key is 1 to {MAX_KEY} printable ASCII characters: {key[:80]!r} ({len(key)} characters)")


def check_value(key: str, value: bytes) -> None:
    """:raises ValueError: the value is longer than `MAX_VALUE`."""
    if len(value) > MAX_VALUE:
        raise ValueError(f"a discovery value is at most {MAX_VALUE} bytes, and that of {key!r} has {len(value)}")
