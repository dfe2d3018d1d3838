"""What only the compiled store has to prove: it is there, it survives what callers get wrong, and no pattern of keys confuses its tables."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def Store():
    return pytest.importorskip("dynamo_kv_native", reason="dynamo-kv-native was not compiled", exc_type=ImportError).Store


def holders(store, key: int, width: int) -> list[int]:
    found = np.zeros(width, np.int32)
    store.depths(np.array([key], np.uint64), (), (1 << width) - 1, found)
    return found.nonzero()[0].tolist()


COMPILER = os.environ.get("CC", "cc")
compiles = pytest.mark.skipif(
    shutil.which(COMPILER) is None or not Path(sysconfig.get_path("include"), "Python.h").exists(), reason="this machine has no C compiler, or no Python.h"
)


@compiles
def test_it_is_compiled_wherever_that_is_possible() -> None:
    import dynamo_kv_native

    assert len(dynamo_kv_native.Store(1, 1)) == 0


# ------------------------------------------------------------------ what callers get wrong

KEYS = np.arange(10, dtype=np.uint64)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((KEYS.astype(np.int64), 0), TypeError),
        ((KEYS.astype(np.uint32), 0), TypeError),
        ((KEYS.astype(np.float64), 0), TypeError),
        ((KEYS.astype(">u8"), 0), TypeError),
        ((KEYS.astype("M8[s]"), 0), (TypeError, ValueError)),
        ((np.zeros(4, "u4,u4"), 0), TypeError),
        ((KEYS.reshape(2, 5), 0), TypeError),
        ((np.array(1, np.uint64), 0), TypeError),
        (([1, 2], 0), TypeError),
        ((b"12345678", 0), TypeError),
        ((None, 0), TypeError),
        ((KEYS, -1), ValueError),
        ((KEYS, 1 << 20), ValueError),
        ((KEYS, 1 << 31), (ValueError, OverflowError)),
        ((KEYS, 1 << 80), OverflowError),
        ((KEYS, 1.5), TypeError),
        ((KEYS, "1"), TypeError),
        ((KEYS,), TypeError),
        ((KEYS, 1, 2), TypeError),
        ((), TypeError),
    ],
)
def test_nonsense_raises_and_changes_nothing(Store, arguments, error) -> None:
    store = Store(4, 100)
    store.add(KEYS[:3], 1)
    for change in (store.add, store.remove):
        with pytest.raises(error):
            change(*arguments)
    assert len(store) == 3


def test_questions_that_make_no_sense_raise(Store) -> None:
    store, out = Store(4, 100), np.zeros(8, np.int32)
    store.add(KEYS, 7)
    for arguments, error in [
        ((KEYS, (), 1, np.zeros(8, np.int64)), TypeError),
        ((KEYS, (), 1, np.zeros(16, np.int32)[::2]), ValueError),
        ((KEYS, (), 1, np.zeros((2, 4), np.int32)), TypeError),
        ((KEYS, (), 1, np.frombuffer(bytes(32), np.int32)), ValueError),
        ((KEYS, (), 1, None), TypeError),
        ((KEYS, [], 1, out), TypeError),
        ((KEYS, (None,), 1, out), TypeError),
        ((KEYS, (store,) * 8, 1, out), TypeError),
        ((KEYS, (), 1 << 8, out), OverflowError),
        ((KEYS, (), 1 << 900, out), OverflowError),
        ((KEYS, (), -1, out), OverflowError),
        ((KEYS, (), 1.0, out), TypeError),
        ((KEYS, (), None, out), TypeError),
        ((KEYS.astype(np.int64), (), 1, out), TypeError),
        ((KEYS, (), 1, np.zeros(1 << 21, np.int32)), ValueError),
        ((KEYS, (), 1), TypeError),
    ]:
        with pytest.raises(error):
            store.depths(*arguments)
    assert not out.any()
    store.depths(KEYS, (store,) * 6, 1 << 7, out)
    assert out.tolist() == [0] * 7 + [10]
    store.depths(KEYS, (), 0, np.zeros(0, np.int32))


def test_sweeps_of_shards_and_slots_that_cannot_be_raise(Store) -> None:
    store = Store(4, 100)
    for arguments, error in [((4, 1), IndexError), ((-1, 1), IndexError), ((0, -1), OverflowError), ((0, 1 << (1 << 21)), ValueError), ((0, None), TypeError), ((0,), TypeError)]:
        with pytest.raises(error):
            store.sweep(*arguments)
    store.sweep(0, 0)


@pytest.mark.parametrize(("shards", "room"), [(0, 1), (3, 1), (1 << 17, 1), (-1, 1), (1, 0), (1, -1), (1, 1 << 40), (1 << 70, 1)])
def test_a_store_that_cannot_be_is_refused(Store, shards: int, room: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        Store(shards, room)


def test_keys_may_lie_in_memory_in_any_way(Store) -> None:
    store, raw = Store(4, 1000), bytes(1) + KEYS.tobytes()
    store.add(np.arange(40, dtype=np.uint64)[::-4], 0)
    store.add(np.frombuffer(raw, np.uint8)[1:].view(np.uint64), 1)
    store.add(np.broadcast_to(np.uint64(99), 5), 2)
    store.add(KEYS[:0], 3)
    assert len(store) == 10 + 10 - len({*range(3, 40, 4)} & {*range(10)}) + 1
    assert holders(store, 99, 4) == [2]
    assert holders(store, 3, 4) == [0, 1]


# ------------------------------------------------------------------ tables

ODD = 0x9E3779B97F4A7C15


@pytest.mark.parametrize("spread", [1, 2**16, 2**32])
def test_keys_that_all_want_the_same_bucket_are_told_apart(Store, spread: int) -> None:
    """The table multiplies keys by an odd number; here it is undone, so that the products are close together."""
    undo, rng = pow(ODD, -1, 2**64), random.Random(spread)
    keys = [i * spread * undo % 2**64 for i in range(300)]
    store, held = Store(1, 10_000), {}
    for _ in range(5000):
        key, slot = rng.choice(keys), rng.randrange(3)
        if rng.random() < 0.6:
            store.add(np.array([key], np.uint64), slot)
            held.setdefault(key, set()).add(slot)
        else:
            store.remove(np.array([key], np.uint64), slot)
            held.setdefault(key, set()).discard(slot)
    assert all(holders(store, key, 3) == sorted(held.get(key, ())) for key in keys)
    assert len(store) == sum(map(bool, held.values()))


def test_a_store_that_has_been_emptied_a_thousand_times_is_as_good_as_new(Store) -> None:
    store, rng = Store(2, 5000), random.Random(1)
    for turn in range(1000):
        keys = np.array([rng.getrandbits(64) for _ in range(50)], np.uint64)
        store.add(keys, turn % 130)
        store.add(keys, 131)
        assert len(store) == 50
        store.remove(keys, 131)
        store.remove(keys[::-1], turn % 130)
        assert len(store) == 0


def test_the_last_slot_there_can_be_works(Store) -> None:
    store, out = Store(1, 10), np.zeros(1 << 20, np.int32)
    store.add(KEYS[:4], (1 << 20) - 1)
    store.add(KEYS[:2], 0)
    store.depths(KEYS, (), (1 << (1 << 20)) - 1, out)
    assert (out[0], out[-1], out.sum()) == (2, 4, 6)
    store.sweep(0, 1 << (1 << 20) - 1)
    assert len(store) == 2


# ------------------------------------------------------------------ installation


def wheel(folder: Path, compiler: str) -> Path:
    shutil.copytree(FOLDER, folder / "source", ignore=shutil.ignore_patterns("*.so", "*.egg-info", "build", "tests"))
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("it is built with uv, which is not here")
    built = subprocess.run([uv, "build", "--wheel", "--out-dir", str(folder), str(folder / "source")], env={**os.environ, "CC": compiler}, capture_output=True, text=True, timeout=240)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_without_a_compiler_it_can_be_installed_and_says_at_its_import_what_is_missing(tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel(tmp_path, "/no/such/compiler")) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "installed")
    ran = subprocess.run([sys.executable, "-S", "-c", "import dynamo_kv_native"], env={"PYTHONPATH": str(tmp_path / "installed")}, capture_output=True, text=True, timeout=60)
    assert "ImportError: dynamo-kv-native was installed without a C compiler" in ran.stderr


@compiles
@pytest.mark.slow
def test_one_wheel_serves_every_python_from_3_11_on(tmp_path: Path) -> None:
    assert "-cp311-abi3-" in wheel(tmp_path, COMPILER).name
