"""The tests of the compiled parts once more, on a build that reports every access outside of what was allocated, every use after free and all undefined behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]
ROUTER = FOLDER.parent / "dynamo-kv-router" / "tests"
EVENTS = [FOLDER.parents[2] / "tests" / "kv" / name for name in ("test_engine_events.py", "test_hashing.py", "test_blocks.py", "test_chains.py")]
CHECKS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
MACROS = ["-DPy_LIMITED_API=0x030B0000", "-DPY_SSIZE_T_CLEAN=1"]
RUN = """
import sys, pytest, dynamo_kv_native
assert dynamo_kv_native.__file__.startswith(sys.argv[1]), dynamo_kv_native.__file__
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not python and not plain", *sys.argv[2:]]))
"""


def library(name: str) -> str | None:
    """Where gcc keeps a sanitizer's runtime; it says the bare name when there is none."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory):
    """Runs Python on a sanitized build."""
    if shutil.which("gcc") is None or (runtimes := [library("libasan.so"), library("libubsan.so")]).count(None):
        pytest.skip("gcc or its sanitizers are not here")
    where = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(FOLDER / "src" / "dynamo_kv_native", where / "dynamo_kv_native", ignore=shutil.ignore_patterns("*.so"))
    package = where / "dynamo_kv_native"
    command = ["gcc", *CHECKS, *MACROS, "-std=c11", "-fPIC", "-shared", f"-I{sysconfig.get_path('include')}"]
    for part in ("_store", "_blocks", "_events", "_names"):
        built = subprocess.run([*command, str(package / f"{part}.c"), "-o", str(package / f"{part}.abi3.so")], capture_output=True, text=True, timeout=120)
        if "fatal error: Python.h" in built.stderr:
            pytest.skip("Python.h is not here")
        assert built.returncode == 0, built.stderr
    # Python itself leaks a little on its way out.
    settings = {"LD_PRELOAD": " ".join(map(str, runtimes)), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc", "PYTHONPATH": str(where)}

    def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *arguments], env={**os.environ, **settings}, capture_output=True, text=True, timeout=250)

    run.where = where  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_all_tests_pass_under_the_sanitizers(sanitized) -> None:
    ran = sanitized(RUN, str(sanitized.where), str(FOLDER / "tests"), str(ROUTER / "test_kv_store.py"), *map(str, EVENTS))
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.slow
def test_a_message_is_never_read_past_its_end(sanitized) -> None:
    """Each message ends where its memory does, so that a byte too much is seen."""
    event = "{'type': 'BlockStored', 'block_hashes': [1, -2, b'3'], 'token_ids': [1, 200, 60000, 2**31, 2**63] * 20, 'x': {'y': [None, 'z' * 40, 0.5]}}"
    lines = ["import msgspec", "from dynamo_kv_native import pack_numbers", f"whole = msgspec.msgpack.encode([1.0, [{event}, [*{event}.values()]], 0])"]
    lines += ["assert len(pack_numbers(whole)) > len(whole)"]
    lines += ["for size in range(len(whole) + 1):", "    pack_numbers(bytearray(whole[:size]))"]
    lines += ["    for byte in (0x80, 0x90, 0xc1, 0xc6, 0xcf, 0xdb, 0xdd, 0xdf, 0xff):", "        pack_numbers(bytearray(whole[:size]) + bytes([byte]) + whole[size + 1 : size + 99])"]
    ran = sanitized("\n".join(lines))
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizers_look(sanitized) -> None:
    """An array that says to be longer than it is: the store must believe numpy, and the sanitizer must not."""
    lie = "import numpy as np; from dynamo_kv_native import Store\n"
    lie += "Store(1, 10000).add(np.lib.stride_tricks.as_strided(np.zeros(4, np.uint64), (1000,), (8,)), 0)"
    ran = sanitized(lie)
    assert ran.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ran.stderr
