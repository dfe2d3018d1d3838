"""KV cache events on the event plane: one message for each batch that an engine reports.

A message is the msgpack array `[dp_rank, [event, ...]]`; an event is an array whose first item says its kind:
`["s", hashes, parent, token_ids, tier, adapter, cache_salt]`, `["r", hashes, tier]` or `["c"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, list[list[Any]]])


def encode(events: Sequence[KvEvent], dp_rank: int) -> bytes:
    return _encoder.encode((dp_rank, [_row(event) for event in events]))


def _row(event: KvEvent) -> list[Any]:
    match event:
        case BlocksStored():
            return ["s", event.hashes, event.parent, event.token_ids, event.tier, event.adapter, event.cache_salt]
        case BlocksRemoved():
            return ["r", event.hashes, event.tier]
        case BlocksCleared():
            return ["c"]


def decode(payload: bytes) -> tuple[int, list[KvEvent]]:
    """:raises msgspec.MsgspecError: not such a message. :raises ValueError: an unknown kind of event."""
    dp_rank, rows = _decoder.decode(payload)
    return dp_rank, [_event(row) for row in rows]


def _event(row: list[Any]) -> KvEvent:
    match row:
        case ["s", list(hashes), parent, list(token_ids), str(tier), adapter, salt]:
            return BlocksStored(hashes, parent, token_ids, tier, adapter, salt)
        case ["r", list(hashes), str(tier)]:
            return BlocksRemoved(hashes, tier)
        case ["c"]:
            return BlocksCleared()
        case _:
            raise ValueError(f"not a KV event: {row[:1]!r} with {len(row)} items")
