"""What vLLM and SGLang publish of their KV caches, as the events of the engine contract.

A message is msgpack: `[time, [event, ...], data-parallel rank]`. An event is a map with its kind in `type`, or, from older engines, an
array that begins with it. Kinds and fields that are not known here are skipped.

Nearly all of the work is the tokens and hashes of stored blocks: as Python numbers they would take longer to make than everything else that
is done with them. Where `dynamo-kv-native` is installed they never become numbers.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent

Hash = int | bytes

_TIERS = {
    "GPU": "device", "DEVICE": "device", None: "device",
    "CPU": "host", "CPU_PINNED": "host", "CPU_TIER1": "host",
    "CPU_TIER2": "disk", "DISK": "disk", "NVME": "disk", "STORAGE": "disk",
}  # fmt: skip
"""Everything else is `external`. vLLM calls its main memory `GPU`, on CPU too."""
_FULL = ("full_attention", "mla_attention", None)
"""Kinds of cache whose blocks say that a prefix is there. Others (sliding windows, state) keep only a part of it."""


class _Stored(msgspec.Struct, gc=False, tag_field="type", tag="BlockStored"):
    block_hashes: msgspec.Raw
    parent_block_hash: Hash | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    block_mm_infos: msgspec.Raw = msgspec.Raw()
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    cache_salt: str | None = None
    """Of SGLang, in maps alone; vLLM has it among the extra keys of a prompt's first block."""


class _Removed(msgspec.Struct, gc=False, tag_field="type", tag="BlockRemoved"):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, gc=False, tag_field="type", tag="AllBlocksCleared"):
    pass


class _StoredArray(_Stored, array_like=True, gc=False, tag="BlockStored"):
    pass


class _RemovedArray(_Removed, array_like=True, gc=False, tag="BlockRemoved"):
    pass


class _ClearedArray(_Cleared, array_like=True, gc=False, tag="AllBlocksCleared"):
    pass


class _Maps(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[_Stored | _Removed | _Cleared]


class _Arrays(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[_StoredArray | _RemovedArray | _ClearedArray]


class _Anything(msgspec.Struct, array_like=True, gc=False):
    at: float
    events: list[msgspec.Raw]


_maps = msgspec.msgpack.Decoder(_Maps).decode
_arrays = msgspec.msgpack.Decoder(_Arrays).decode
_anything = msgspec.msgpack.Decoder(_Anything).decode
_map = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared).decode
_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray).decode
_KINDS = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


def _decoded(message: bytes) -> Sequence[_Stored | _Removed | _Cleared]:
    for decode in (_maps, _arrays):
        try:
            return decode(message).events
        except msgspec.ValidationError:
            pass
    return [event for raw in _anything(message).events if (event := _known(raw)) is not None]


def _known(raw: msgspec.Raw) -> _Stored | _Removed | _Cleared | None:
    """An event by itself; `None` for kinds that are not known here."""
    try:
        return _map(raw)
    except msgspec.ValidationError:
        plain: Any = msgspec.msgpack.decode(raw)
        kind: Any = plain.get("type") if isinstance(plain, dict) else plain[0] if isinstance(plain, list) and plain else None
        if not isinstance(kind, str) or (kind in _KINDS and isinstance(plain, dict)):
            raise
        return _array(raw) if kind in _KINDS else None


_numbers = msgspec.msgpack.Decoder(list[int]).decode
_hashes = msgspec.msgpack.Decoder(list[Hash]).decode
_PACKED, _HEAD = 0xC6, 5
"""How numbers begin that `pack_numbers` has packed, and where the first of them is."""

try:
    from dynamo_kv_native import pack_numbers
except ImportError:
    pack_numbers: Callable[[bytes], bytes] | None = None


def _tokens_of(raw: msgspec.Raw) -> array[int]:
    """:raises ValueError: no array of whole numbers. :raises OverflowError: one is negative."""
    return found if (found := _unpacked(raw)) is not None else array("Q", _numbers(raw))


def _hashes_of(raw: msgspec.Raw) -> Sequence[Hash]:
    """:raises ValueError: they are neither numbers nor bytes."""
    return found if (found := _unpacked(raw)) is not None else _hashes(raw)


def _unpacked(raw: msgspec.Raw) -> array[int] | None:
    view = memoryview(raw)
    if view[0] != _PACKED:
        return None
    found = array("Q")
    found.frombytes(view[_HEAD:])
    return found


class EngineEvents:
    """Reads the messages of one rank, in order. Remembers which blocks hang below a salted one: only the first block of a prompt names its salt."""

    def __init__(self, media: str | None = None) -> None:
        """:param media: what names of media in extra keys begin with; they are those of `Request.media` without it. `None`: media are unknown."""
        self._media = media
        self._salts: dict[Hash, str] = {}
        self._ignored_groups: set[int] = set()

    def read(self, message: bytes) -> list[KvEvent]:
        """:raises ValueError: the message is not understood; `msgspec.MsgspecError` is one. :raises OverflowError: a token is negative.

        :raises RecursionError: it is nested without end.
        """
        events: list[KvEvent] = []
        for event in _decoded(message if pack_numbers is None else pack_numbers(message)):
            match event:
                case _Stored():
                    if self._counts(event):
                        events.append(self._stored(event))
                case _Removed():
                    if event.group_idx not in self._ignored_groups:
                        hashes = _hashes_of(event.block_hashes)
                        for block in hashes if self._salts else ():
                            self._salts.pop(block, None)
                        events.append(BlocksRemoved(hashes, _TIERS.get(event.medium, "external")))
                case _Cleared():
                    self._salts.clear()
                    events.append(BlocksCleared())
        return events

    def _counts(self, event: _Stored) -> bool:
        if event.kv_cache_spec_kind in _FULL:
            return True
        self._ignored_groups.add(event.group_idx or 0)
        return False

    def _stored(self, event: _Stored) -> BlocksStored:
        hashes, parent, adapter = _hashes_of(event.block_hashes), event.parent_block_hash, event.lora_name
        if event.cache_salt is not None:
            salt = event.cache_salt
        else:
            salt = self._salts.get(parent) if parent is not None else self._salt(event)
            if salt is not None:
                self._salts |= dict.fromkeys(hashes, salt)
        media = self._digests(event) if event.extra_keys else ()
        return BlocksStored(hashes, parent, _tokens_of(event.token_ids), _TIERS.get(event.medium, "external"), adapter, salt, media, event.block_size)

    def _salt(self, event: _Stored) -> str | None:
        keys = (event.extra_keys or [None])[0] or ()
        names = keys[1 if event.lora_name is not None else 0 :]
        return next((name for name in names if isinstance(name, str) and not (self._media and name.startswith(self._media))), None)

    def _digests(self, event: _Stored) -> list[list[int | str | bytes]]:
        """For each block, the media that reach into it; nothing when there are none."""
        found: list[list[int | str | bytes]] = []
        if (prefix := self._media) is not None:
            for keys in event.extra_keys or ():
                names = [key[0] if isinstance(key, list | tuple) and key else key for key in keys or ()]
                found.append([name.removeprefix(prefix) for name in names if isinstance(name, str) and name.startswith(prefix)])
        return found if any(found) else []

