"""Reads the configuration of NVIDIA Dynamo's global router: JSON, one file for both roles or for the aggregated one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from dynamo_core.cards import Role
from dynamo_core.config import structure
from dynamo_core.errors import ConfigError, Problem
from dynamo_global_router.grid import Axis, Grid, Override
from dynamo_global_router.settings import PoolSettings

T = TypeVar("T")
Table = list[list[int]]


class _Override(msgspec.Struct, forbid_unknown_fields=True):
    min_priority: int
    max_priority: int
    target_pool: int


class _Targets(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the three kinds of table have in common. Names without `_ms` are older ones for the same."""

    ttft_min_ms: float | None = None
    ttft_max_ms: float | None = None
    ttft_min: float | None = None
    ttft_max: float | None = None
    ttft_resolution: int | None = None
    itl_min_ms: float | None = None
    itl_max_ms: float | None = None
    itl_min: float | None = None
    itl_max: float | None = None
    itl_resolution: int | None = None
    priority_overrides: list[_Override] = []


class _Prefill(_Targets, forbid_unknown_fields=True, kw_only=True):
    isl_min: float
    isl_max: float
    isl_resolution: int
    prefill_pool_mapping: Table


class _Decode(_Targets, forbid_unknown_fields=True, kw_only=True):
    context_length_min: float
    context_length_max: float
    context_length_resolution: int
    decode_pool_mapping: Table


class _Aggregated(_Targets, forbid_unknown_fields=True, kw_only=True):
    isl_min: float | None = None
    isl_max: float | None = None
    isl_resolution: int | None = None
    agg_pool_mapping: list[Any]
    """By TTFT and ITL, or by length, TTFT and ITL."""


class _Disagg(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    mode: Literal["disagg"] = "disagg"
    num_prefill_pools: int
    num_decode_pools: int
    prefill_pool_dynamo_namespaces: list[str]
    decode_pool_dynamo_namespaces: list[str]
    prefill_pool_priorities: list[int] | None = None
    decode_pool_priorities: list[int] | None = None
    enable_priority_retry: bool = False
    prefill_pool_selection_strategy: _Prefill
    decode_pool_selection_strategy: _Decode


class _Agg(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    mode: Literal["agg"]
    num_agg_pools: int
    agg_pool_dynamo_namespaces: list[str]
    agg_pool_priorities: list[int] | None = None
    enable_priority_retry: bool = False
    agg_pool_selection_strategy: _Aggregated


def read(path: Path, role: Role) -> tuple[tuple[PoolSettings, ...], Grid]:
    """The pools of `role` and the table that chooses among them. A pool has the name of its namespace.

    :raises ConfigError: the file cannot be used, or is of the other mode.
    """
    try:
        return _read(path.read_bytes(), role)
    except OSError as e:
        raise ConfigError(Problem(f"cannot be read: {e.strerror}", str(path))) from None
    except ConfigError as e:
        raise ConfigError(*(Problem(problem.what, str(path), remedy=problem.remedy) for problem in e.problems)) from None
    except (msgspec.MsgspecError, ValueError) as e:
        raise ConfigError(Problem(str(e), str(path))) from None


def _read(content: bytes, role: Role) -> tuple[tuple[PoolSettings, ...], Grid]:
    mode = msgspec.json.decode(content, type=dict[str, Any]).get("mode", "disagg")
    if role == "aggregated":
        if mode != "agg":
            raise ValueError(f"its mode is {mode!r}, for two routers: one with role = \"prefill\", and one with role = \"decode\"")
        agg = msgspec.json.decode(content, type=_Agg)
        names, by = agg.agg_pool_dynamo_namespaces, agg.agg_pool_selection_strategy
        pools = _pools(names, agg.num_agg_pools, agg.agg_pool_priorities, "agg")
        there = [value is not None for value in (by.isl_min, by.isl_max, by.isl_resolution)]
        if any(there) and not all(there):
            raise ValueError("agg_pool_selection_strategy: isl_min, isl_max and isl_resolution are there together or not at all")
        grid = Grid(_table(by.agg_pool_mapping, names), _axis(by.isl_min, by.isl_max, by.isl_resolution, "isl") if any(there) else None,
                    _ttft(by), _itl(by), _overrides(by, names), agg.enable_priority_retry)
        return pools, grid
    if mode != "disagg":
        raise ValueError(f"its mode is {mode!r}, for one router with role = \"aggregated\"")
    both = msgspec.json.decode(content, type=_Disagg)
    if role == "prefill":
        names, by = both.prefill_pool_dynamo_namespaces, both.prefill_pool_selection_strategy
        pools = _pools(names, both.num_prefill_pools, both.prefill_pool_priorities, "prefill")
        length = _axis(by.isl_min, by.isl_max, by.isl_resolution, "isl")
        return pools, Grid(_table(by.prefill_pool_mapping, names), length, _ttft(by), None, _overrides(by, names), both.enable_priority_retry)
    names, by = both.decode_pool_dynamo_namespaces, both.decode_pool_selection_strategy
    pools = _pools(names, both.num_decode_pools, both.decode_pool_priorities, "decode")
    length = _axis(by.context_length_min, by.context_length_max, by.context_length_resolution, "context_length")
    return pools, Grid(_table(by.decode_pool_mapping, names), length, None, _itl(by), _overrides(by, names), both.enable_priority_retry)


def _pools(namespaces: Sequence[str], count: int, priorities: Sequence[int] | None, kind: str) -> tuple[PoolSettings, ...]:
    for name, values in ((f"{kind}_pool_dynamo_namespaces", namespaces), (f"{kind}_pool_priorities", priorities)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries, and num_{kind}_pools is {count}")
    if len({*namespaces}) < len(namespaces):
        raise ValueError(f"{kind}_pool_dynamo_namespaces names a namespace twice")
    ranks = priorities if priorities is not None else range(count)
    return tuple(structure(PoolSettings, {"name": namespace, "namespace": namespace, "rank": rank}) for namespace, rank in zip(namespaces, ranks, strict=True))


def _name(index: int, names: Sequence[str]) -> str:
    if not 0 <= index < len(names):
        raise ValueError(f"there is no pool {index}; they are numbered from 0 to {len(names) - 1}")
    return names[index]


def _table(cells: Any, names: Sequence[str]) -> Any:
    if isinstance(cells, list):
        return tuple(_table(cell, names) for cell in cells)
    if type(cells) is not int:
        raise ValueError(f"a mapping holds numbers of pools: {cells!r}")
    return _name(cells, names)


def _overrides(by: _Targets, names: Sequence[str]) -> tuple[Override, ...]:
    return tuple(Override(_name(o.target_pool, names), o.min_priority, o.max_priority) for o in by.priority_overrides)


def _ttft(by: _Targets) -> Axis:
    return _axis(_either(by.ttft_min_ms, by.ttft_min, "ttft_min"), _either(by.ttft_max_ms, by.ttft_max, "ttft_max"), by.ttft_resolution, "ttft")


def _itl(by: _Targets) -> Axis:
    return _axis(_either(by.itl_min_ms, by.itl_min, "itl_min"), _either(by.itl_max_ms, by.itl_max, "itl_max"), by.itl_resolution, "itl")


def _either(value: float | None, older: float | None, name: str) -> float | None:
    if value is not None and older is not None:
        raise ValueError(f"{name} and {name}_ms are two names of one number")
    return older if value is None else value


def _axis(low: float | None, high: float | None, resolution: int | None, name: str) -> Axis:
    if low is None or high is None or resolution is None:
        raise ValueError(f"the range of {name} needs its minimum, its maximum and its resolution")
    try:
        return Axis(low, high, resolution)
    except ValueError as e:
        raise ValueError(f"the range of {name}: {e.args[0]}") from None
