from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dynamo_llamacpp.gguf import Malformed, read_metadata

METADATA = {"a.text": "héllo", "a.flag": True, "a.count": 7, "a.ratio": 0.5, "a.words": ["x", "", "ÿ"], "a.numbers": [1, -2, 3]}


def test_what_was_written_is_read(gguf_writer: Callable[..., Path], tmp_path: Path) -> None:
    path = gguf_writer(tmp_path / "m.gguf", METADATA, {"t": np.zeros((2, 2))})
    assert read_metadata(path) == METADATA


def test_a_header_cut_anywhere_is_reported_and_never_crashes(gguf_writer: Callable[..., Path], tmp_path: Path) -> None:
    whole = gguf_writer(tmp_path / "m.gguf", METADATA, {}).read_bytes().rstrip(b"\0")
    cut = tmp_path / "cut.gguf"
    for size in range(len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(Malformed, match=r"cut\.gguf"):
            read_metadata(cut)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 a zip file, say", "does not begin"),
        (struct.pack("<4sIQQ", b"GGUF", 9, 0, 0), "version 9"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**40), "keys"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60), "string of"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 99), "unknown type 99"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 2**50), "array of"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1), "array of arrays"),
    ],
    ids=["empty", "other-format", "version", "keys", "string", "type", "array", "nested"],
)
def test_what_is_no_gguf_file_is_refused_with_the_reason(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(Malformed, match=why):
        read_metadata(path)
