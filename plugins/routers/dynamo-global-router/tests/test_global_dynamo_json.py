"""Configurations of NVIDIA Dynamo's global router are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import ConfigError
from dynamo_global_router.contract import Estimate, PoolFacts, PoolName, PoolRequest
from dynamo_global_router.dynamo_json import read

DISAGG: dict[str, Any] = {
    "num_prefill_pools": 2,
    "num_decode_pools": 2,
    "prefill_pool_dynamo_namespaces": ["prefill-small", "prefill-large"],
    "decode_pool_dynamo_namespaces": ["decode-short", "decode-long"],
    "prefill_pool_priorities": [1, 0],
    "enable_priority_retry": True,
    "prefill_pool_selection_strategy": {
        "isl_min": 0, "isl_max": 32000, "isl_resolution": 2, "ttft_min_ms": 10, "ttft_max_ms": 3000, "ttft_resolution": 2,
        "prefill_pool_mapping": [[0, 0], [1, 0]], "priority_overrides": [{"min_priority": 10, "max_priority": 100, "target_pool": 1}],
    },
    "decode_pool_selection_strategy": {
        "context_length_min": 0, "context_length_max": 32000, "context_length_resolution": 2, "itl_min": 5, "itl_max": 50, "itl_resolution": 1,
        "decode_pool_mapping": [[0], [1]],
    },
}
AGG: dict[str, Any] = {
    "mode": "agg", "num_agg_pools": 2, "agg_pool_dynamo_namespaces": ["quick", "plain"],
    "agg_pool_selection_strategy": {
        "ttft_min_ms": 0, "ttft_max_ms": 1000, "ttft_resolution": 2, "itl_min_ms": 0, "itl_max_ms": 100, "itl_resolution": 2, "agg_pool_mapping": [[0, 0], [0, 1]],
    },
}


@pytest.fixture
def written(tmp_path: Path):
    def write(config: Any) -> Path:
        path = tmp_path / "global_router_config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return path

    return write


def chosen(path: Path, role: Any, request: PoolRequest) -> list[str]:
    pools, grid = read(path, role)
    names = [PoolName(pool.name, pool.rank or 0, pool.cost) for pool in pools]
    grid.bind(names, role)
    facts = [PoolFacts(name.name, name.rank, name.cost, estimate=Estimate(1, 1)) for name in names]
    return [facts[row].name for row in grid.choose(request, facts).order]


def test_a_disaggregated_configuration_serves_both_roles(written) -> None:
    path = written(DISAGG)
    assert chosen(path, "prefill", PoolRequest("r", "prefill", 100, 0, 2000.0)) == ["prefill-small", "prefill-large"]
    assert chosen(path, "prefill", PoolRequest("r", "prefill", 20000, 0, 100.0)) == ["prefill-large"]
    assert chosen(path, "prefill", PoolRequest("r", "prefill", 20000, 0, 2000.0)) == ["prefill-small", "prefill-large"]
    assert chosen(path, "prefill", PoolRequest("r", "prefill", 100, 50, 2000.0)) == ["prefill-large"]
    assert chosen(path, "decode", PoolRequest("r", "decode", 100)) == ["decode-short"]
    assert chosen(path, "decode", PoolRequest("r", "decode", 20000)) == ["decode-long", "decode-short"]
    pools, _ = read(path, "prefill")
    assert [(pool.name, pool.namespace, pool.rank) for pool in pools] == [("prefill-small", "prefill-small", 1), ("prefill-large", "prefill-large", 0)]


def test_an_aggregated_configuration_has_two_axes_or_three(written) -> None:
    path = written(AGG)
    assert chosen(path, "aggregated", PoolRequest("r", input_tokens=9, ttft_target_ms=900.0, itl_target_ms=90.0)) == ["plain"], "retry is off unless it says so"
    assert chosen(path, "aggregated", PoolRequest("r", ttft_target_ms=100.0, itl_target_ms=90.0)) == ["quick"]
    by = AGG["agg_pool_selection_strategy"]
    three = {**by, "isl_min": 0, "isl_max": 100, "isl_resolution": 2, "agg_pool_mapping": [[[0, 0], [0, 0]], by["agg_pool_mapping"]]}
    path = written({**AGG, "agg_pool_selection_strategy": three})
    late = {"ttft_target_ms": 900.0, "itl_target_ms": 90.0}
    assert chosen(path, "aggregated", PoolRequest("r", input_tokens=9, **late)) == ["quick"]
    assert chosen(path, "aggregated", PoolRequest("r", input_tokens=99, **late)) == ["plain"]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_every_cell_is_found_by_the_formula_of_the_file_format(tmp_path_factory, data) -> None:
    """index = int((value - min) / ((max - min) / resolution)), kept within the table."""
    pools = data.draw(st.integers(1, 4))
    axes = [(data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 5))) for _ in range(3)]
    (isl, wide, isl_n), (ttft, span, ttft_n), (itl, reach, itl_n) = axes
    cell = st.integers(0, pools - 1)
    mapping = data.draw(st.lists(st.lists(st.lists(cell, min_size=itl_n, max_size=itl_n), min_size=ttft_n, max_size=ttft_n), min_size=isl_n, max_size=isl_n))
    path = tmp_path_factory.mktemp("grid") / "config.json"
    path.write_text(json.dumps({
        "mode": "agg", "num_agg_pools": pools, "agg_pool_dynamo_namespaces": [f"pool-{i}" for i in range(pools)],
        "agg_pool_selection_strategy": {
            "isl_min": isl, "isl_max": isl + wide, "isl_resolution": isl_n, "ttft_min_ms": ttft, "ttft_max_ms": ttft + span, "ttft_resolution": ttft_n,
            "itl_min_ms": itl, "itl_max_ms": itl + reach, "itl_resolution": itl_n, "agg_pool_mapping": mapping,
        },
    }))
    prompt, first, between = data.draw(st.integers(0, 7000)), data.draw(st.floats(0, 7000)), data.draw(st.none() | st.floats(0, 7000))

    def index(value: float, low: int, width: int, steps: int) -> int:
        return min(max(int((value - low) / (width / steps)), 0), steps - 1)

    wanted = mapping[index(prompt, *axes[0])][index(first, *axes[1])][index(itl + reach / 2 if between is None else between, *axes[2])]
    assert chosen(path, "aggregated", PoolRequest("r", "aggregated", prompt, 0, first, between)) == [f"pool-{wanted}"]


def prefill(**changes: Any) -> dict[str, Any]:
    return {**DISAGG, "prefill_pool_selection_strategy": {**DISAGG["prefill_pool_selection_strategy"], **changes}}


@pytest.mark.parametrize(("config", "role", "message"), [
    (AGG, "prefill", "its mode is 'agg', for one router with role"),
    (DISAGG, "aggregated", "its mode is 'disagg', for two routers"),
    ({**DISAGG, "num_prefill_pools": 3}, "prefill", "prefill_pool_dynamo_namespaces has 2 entries, and num_prefill_pools is 3"),
    ({**DISAGG, "prefill_pool_priorities": [1]}, "prefill", "prefill_pool_priorities has 1 entries"),
    ({**DISAGG, "num_prefil_pools": 3}, "prefill", "unknown field `num_prefil_pools`"),
    ({**DISAGG, "prefill_pool_dynamo_namespaces": ["a", "a"]}, "prefill", "names a namespace twice"),
    ({**DISAGG, "prefill_pool_dynamo_namespaces": ["a", "Not A Name"]}, "prefill", "namespace"),
    (prefill(prefill_pool_mapping=[[0, 2], [0, 0]]), "prefill", "there is no pool 2; they are numbered from 0 to 1"),
    (prefill(isl_min=99999), "prefill", "range of isl: max must be above min"),
    (prefill(ttft_min_ms=None), "prefill", "the range of ttft needs its minimum"),
    (prefill(ttft_min=1), "prefill", "ttft_min and ttft_min_ms are two names of one number"),
    (prefill(isl_resolution="many"), "prefill", "Expected `int`, got `str`"),
    ({**AGG, "agg_pool_selection_strategy": {**AGG["agg_pool_selection_strategy"], "isl_min": 1}}, "aggregated", "are there together or not at all"),
    ({**AGG, "agg_pool_selection_strategy": {**AGG["agg_pool_selection_strategy"], "agg_pool_mapping": [["quick"]]}}, "aggregated", "a mapping holds numbers of pools: 'quick'"),
    ("{", "aggregated", "JSON is malformed|truncated"),
    ("[]", "aggregated", "Expected `object`, got `array`"),
])
def test_a_mistake_is_said_with_its_file(written, config, role, message) -> None:
    path = written(config)
    with pytest.raises(ConfigError, match=message) as refusal:
        read(path, role)
    assert all(problem.where == str(path) for problem in refusal.value.problems)


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read(Path("/nowhere/config.json"), "prefill")
