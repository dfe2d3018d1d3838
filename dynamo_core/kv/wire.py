"""What travels between a worker and the routers about its KV cache: changes of keys, numbered from 1 without holes.

A worker publishes `News` on the event topic `kv`. Its endpoint `kv_state` takes an `Ask` and answers with `News`: the messages after the one
that the asker has seen, or, when they are no longer kept, the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple

import msgspec
import numpy as np

from dynamo_core.kv.hashing import Keys

LEVELS = ("device", "host", "disk", "external")
"""Storage tiers, nearest first. A block counts at the level of the furthest block of its chain up to it: a block on the
device whose parent is on the host can be reached only through the host."""


class Op(IntEnum):
    ADD = 0
    REMOVE = 1
    CLEAR = 2


class Change(NamedTuple):
    """Blocks came to a level or left it. `CLEAR` empties all levels and has no keys."""

    op: Op
    level: int
    keys: Keys


class News(msgspec.Struct, array_like=True, gc=False):
    """One message of one rank. A message without changes is a sign of life: `id` is then that of the last one with changes."""

    stream: int
    """Differs from one start of the worker's relay to the next: numbers of another stream mean nothing."""
    id: int
    dp_rank: int
    secret: int
    """Fingerprint of the secret that the keys were made with."""
    block_size: int
    changes: list[tuple[int, int, bytes]]
    """Op, level, and keys as little-endian 64-bit numbers."""
    whole: bool = False
    """Part of the whole picture as of `id`: forget what you know before the first part. The parts of one answer belong together."""
    problem: str = ""
    """Why these news should not be trusted; empty when all is well."""


class Ask(msgspec.Struct, array_like=True, gc=False):
    """`after`: the last message that the asker has of `stream`; 0 asks for the whole picture."""

    stream: int
    dp_rank: int
    after: int


_encoder = msgspec.msgpack.Encoder()
_news = msgspec.msgpack.Decoder(News)
_ask = msgspec.msgpack.Decoder(Ask)


def encode(message: News | Ask) -> bytes:
    return _encoder.encode(message)


def decode_news(payload: bytes) -> News:
    """:raises msgspec.MsgspecError: it is something else."""
    return _news.decode(payload)


def decode_ask(payload: bytes) -> Ask:
    """:raises msgspec.MsgspecError: it is something else."""
    return _ask.decode(payload)


def pack(changes: Sequence[Change]) -> list[tuple[int, int, bytes]]:
    return [(int(op), level, keys.astype("<u8", copy=False).tobytes()) for op, level, keys in changes]


def joined(changes: Iterable[Change]) -> list[Change]:
    """The same changes in the same order, in as few as possible."""
    runs = ((kind, [change.keys for change in run]) for kind, run in groupby(changes, key=lambda change: change[:2]))
    return [Change(op, level, parts[0] if len(parts) == 1 else np.concatenate(parts)) for (op, level), parts in runs]


def unpack(rows: Sequence[tuple[int, int, bytes]]) -> list[Change]:
    """:raises ValueError: an unknown op or level, or half a key."""
    changes: list[Change] = []
    for op, level, raw in rows:
        if not 0 <= level < len(LEVELS):
            raise ValueError(f"there is no cache level {level}")
        changes.append(Change(Op(op), level, np.frombuffer(raw, "<u8").astype(np.uint64, copy=False)))
    return changes
