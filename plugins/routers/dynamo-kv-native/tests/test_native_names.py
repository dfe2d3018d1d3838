"""What callers can get wrong with the compiled names; that the names are right is tested beside the plain ones (`tests/kv/test_hashing.py`)."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

KEYS = np.arange(10, dtype=np.uint64)


@pytest.fixture(scope="module")
def name_blocks():
    return pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native was not compiled", exc_type=ImportError).name_blocks


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        ((KEYS, KEYS, KEYS), TypeError),
        (([1, 2], KEYS, KEYS, 0), TypeError),
        ((KEYS.astype(np.uint32), KEYS, KEYS, 0), TypeError),
        ((KEYS.astype(np.int64), KEYS, KEYS, 0), TypeError),
        ((KEYS.astype(">u8"), KEYS, KEYS, 0), TypeError),
        ((KEYS[::2], KEYS, KEYS, 0), (TypeError, ValueError, BufferError)),
        ((KEYS.reshape(2, 5), KEYS, KEYS, 0), TypeError),
        ((b"12345678", KEYS, KEYS, 0), TypeError),
        ((KEYS, KEYS, None, 0), TypeError),
        ((KEYS, KEYS[:0], KEYS, 0), ValueError),
        ((KEYS, KEYS, np.zeros(0x10000, np.uint64), 0), ValueError),
        ((KEYS, KEYS[:1], KEYS, (11).to_bytes(8, "big")), TypeError),
        ((KEYS, KEYS[:1], KEYS, 11 << 56), ValueError),  # the depth of a chain that is longer than there are places
        ((KEYS, KEYS, KEYS, -1), OverflowError),
        ((KEYS, KEYS, KEYS, 1 << 64), OverflowError),
        ((KEYS, KEYS, KEYS, "0"), TypeError),
    ],
)
def test_nonsense_raises(name_blocks, arguments, error) -> None:
    with pytest.raises(error):
        name_blocks(*arguments)


def test_names_end_with_the_last_full_block_and_with_the_last_place(name_blocks) -> None:
    assert [len(name_blocks(array("Q", range(n)), KEYS[:4], KEYS, 0)) // 8 for n in (0, 3, 4, 7, 8, 40, 400)] == [0, 0, 1, 1, 2, 10, 10]
    assert len(name_blocks(KEYS, KEYS[:1], KEYS, int.from_bytes((10).to_bytes(8, "big"), "little"))) == 0


def test_numbers_may_lie_anywhere(name_blocks) -> None:
    crooked = np.frombuffer(b"x" + KEYS.tobytes(), np.uint64, 10, 1)
    assert name_blocks(crooked, KEYS[1:3], KEYS, 0) == name_blocks(KEYS, KEYS[1:3], KEYS, 0)
