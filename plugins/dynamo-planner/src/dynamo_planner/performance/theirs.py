"""Profiles that NVIDIA Dynamo's profiler writes, and those that its simulator reads. Times in them are milliseconds.

    DIR/selected_prefill_interpolation/raw_data.npz    prefill_isl, prefill_ttft
    DIR/selected_decode_interpolation/raw_data.npz     x_kv_usage, y_context_length, z_itl, max_kv_tokens
    DIR/prefill_raw_data.json, DIR/decode_raw_data.json    the same names
    FILE.npz                                           prefill_isl, prefill_ttft_ms, decode_active_kv_tokens, decode_context_length, decode_itl
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dynamo_planner.contract import Floats
from dynamo_planner.performance.profile import DecodePoint, PrefillPoint, Profile

_PREFILL = ("selected_prefill_interpolation/raw_data.npz", "prefill_raw_data.json")
_DECODE = ("selected_decode_interpolation/raw_data.npz", "decode_raw_data.json")


def is_theirs(raw: bytes) -> bool:
    """Whether a JSON file is one of theirs rather than one of ours."""
    try:
        found: Any = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        return False
    return isinstance(found, dict) and ("prefill_isl" in found or "x_kv_usage" in found)


def read(path: Path) -> Profile:
    """:raises ValueError, KeyError, OSError: a file or an array is missing, or they do not fit together."""
    arrays = _arrays(path) if path.is_file() else {**_arrays(_one_of(path, _PREFILL)), **_arrays(_one_of(path, _DECODE))}
    most = int(arrays["max_kv_tokens"].max()) if "max_kv_tokens" in arrays else None
    lengths = _array(arrays, "prefill_isl")
    times = _array(arrays, "prefill_ttft_ms" if "prefill_ttft_ms" in arrays else "prefill_ttft")
    prefill = tuple(PrefillPoint(float(n), float(ms) / 1000) for n, ms in zip(lengths, times, strict=True))
    decode = tuple(_decode(arrays, most))
    if not decode or not prefill:
        raise ValueError("it has no points")
    return Profile(engine="profiled for NVIDIA Dynamo", prefill=prefill, decode=decode, kv_tokens=most)


def _decode(arrays: Mapping[str, Floats], most: int | None) -> Iterator[DecodePoint]:
    if "x_kv_usage" in arrays:
        if most is None:
            raise ValueError("x_kv_usage is a share of max_kv_tokens, which is missing")
        for usage, context, ms in zip(_array(arrays, "x_kv_usage"), _array(arrays, "y_context_length"), _array(arrays, "z_itl"), strict=True):
            yield DecodePoint(float(context), float(usage) * most / float(context), float(ms) / 1000)
        return
    active, contexts, grid = _array(arrays, "decode_active_kv_tokens"), _array(arrays, "decode_context_length"), arrays["decode_itl"]
    if grid.shape == (contexts.size, active.size) != (active.size, contexts.size):
        grid = grid.T
    if grid.shape != (active.size, contexts.size):
        raise ValueError(f"decode_itl has the shape {grid.shape}, not {active.size} active KV tokens x {contexts.size} context lengths")
    for tokens, row in zip(active, grid, strict=True):
        for context, ms in zip(contexts, row, strict=True):
            yield DecodePoint(float(context), float(tokens) / float(context), float(ms) / 1000)


def _array(arrays: Mapping[str, Floats], name: str) -> Floats:
    if name not in arrays:
        raise ValueError(f"the array {name!r} is missing; there are {', '.join(sorted(arrays))}")
    return arrays[name].ravel()


def _arrays(path: Path) -> dict[str, Floats]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
    found: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items() if isinstance(values, list | int | float)}


def _one_of(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"the directory has neither {' nor '.join(names)}")
