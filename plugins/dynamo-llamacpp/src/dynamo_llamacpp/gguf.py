"""Reads the metadata of a GGUF file: what the model is and how it cuts text, never its weights."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.errors import ConfigError, Problem

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS = 65_536
_MAX_ITEMS = 16_777_216
_MAX_STRING = 64 * 2**20


class Malformed(ConfigError):
    """The file is not a GGUF file that we can read."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(Problem(f"{path} is not a readable GGUF file: {why}", remedy="download the model again, or convert it with a current llama.cpp"))


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's header. Strings are `str`; bytes that are not UTF-8 become surrogates.

    :raises Malformed: no GGUF of version 2 or 3, cut short, or beyond all reason.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise Malformed(path, "it is empty") from None
        with view:
            try:
                return _header(_Cursor(view))
            except (struct.error, IndexError) as e:
                raise Malformed(path, "it ends within its header") from e
            except ValueError as e:
                raise Malformed(path, str(e)) from e


@attrs.define
class _Cursor:
    data: mmap.mmap
    at: int = 0

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self) -> str:
        size = self.scalar("<Q")
        if size > _MAX_STRING:
            raise ValueError(f"a string of {size} bytes")
        end = self.at + size
        if end > len(self.data):
            raise IndexError
        raw = self.data[self.at : end]
        self.at = end
        return raw.decode("utf-8", "surrogateescape")


def _header(cursor: _Cursor) -> dict[str, Any]:
    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor.at = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version} (2 and 3 are known)")
    cursor.scalar("<Q")
    keys = cursor.scalar("<Q")
    if keys > _MAX_KEYS:
        raise ValueError(f"{keys} keys")
    return {cursor.text(): _value(cursor, cursor.scalar("<I")) for _ in range(keys)}


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor)
    if layout := _SCALARS.get(kind):
        return cursor.scalar(layout)
    raise ValueError(f"a value of the unknown type {kind}")


def _array(cursor: _Cursor) -> list[Any]:
    kind = cursor.scalar("<I")
    count = cursor.scalar("<Q")
    if count > _MAX_ITEMS:
        raise ValueError(f"an array of {count} items")
    if kind == _STRING:
        return [cursor.text() for _ in range(count)]
    if kind == _ARRAY:
        raise ValueError("an array of arrays")
    if kind not in _SCALARS:
        raise ValueError(f"an array of the unknown type {kind}")
    layout = f"<{count}{_SCALARS[kind][1]}"
    values = struct.unpack_from(layout, cursor.data, cursor.at)
    cursor.at += struct.calcsize(layout)
    return list(values)
