"""The preset `kv` against Dynamo's published formula, written out literally, and against numbers observed from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.routing.contract import Fleet, RoutingRequest, Worker
from dynamo_core.routing.facts import BLOCK_SIZE, BOOKED_PREFILL_TOKENS, IN_FLIGHT, OVERLAP_TOKENS, TAINTS
from dynamo_core.types import Hints
from dynamo_kv_router.cost import KvCost
from dynamo_kv_router.facts import DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS, HOST_OVERLAP_TOKENS
from dynamo_kv_router.load_facts import POTENTIAL_BLOCKS


def fleet(rows: list[dict], size: int) -> Fleet:
    facts = {
        BOOKED_PREFILL_TOKENS: "active", IN_FLIGHT: "requests", OVERLAP_TOKENS: "device", HOST_OVERLAP_TOKENS: "host", DISK_OVERLAP_TOKENS: "disk",
        EXTERNAL_OVERLAP_TOKENS: "shared", POTENTIAL_BLOCKS: "blocks", TAINTS: "taints",
    }
    columns = {fact: tuple(row.get(key, () if key == "taints" else 0) for row in rows) for fact, key in facts.items()}
    return Fleet([Worker(i) for i in range(len(rows))], {**columns, BLOCK_SIZE: (size,) * len(rows)})


def request(tokens: int, **hints) -> RoutingRequest:
    return RoutingRequest("r", "m", prompt_tokens=tokens, hints=Hints(**hints))


def test_an_idle_worker_costs_what_dynamo_logs_for_it():
    assert KvCost().score(request(604), fleet([{"blocks": 9}], 64)) == pytest.approx([-18.4375])


def test_a_worker_that_holds_nine_blocks_costs_what_dynamo_logs_for_it():
    assert KvCost().score(request(604), fleet([{"blocks": 9, "device": 576}], 64)) == pytest.approx([-9.4375])


def literal(options: dict, isl: int, size: int, rows: list[dict], row: dict, preferred: dict, role: str) -> float:
    bs = size
    cached = row["device"]
    raw_prefill = row["active"] + max(0, isl - cached) + cached
    request_blocks = max(1, math.ceil(isl / bs))
    least = min(r["active"] for r in rows)
    decay = 1 / (1 + options["credit_decay"] * ((row["active"] - least) / bs) / request_blocks)
    credit = (
        options["overlap_credit"] * decay * cached / bs + options["host_weight"] * row["host"] / bs + options["disk_weight"] * row["disk"] / bs
        + options["shared_weight"] * row["shared"] / bs
    )
    term = options["request_weight"] * row["requests"]
    if role == "decode":
        cost = max(0, row["blocks"] - credit) + term
    else:
        prefill = options["prefill_scale"] * max(0, raw_prefill / bs - credit) if options["track_prefill"] else 0
        cost = prefill + row["blocks"] + term
    if preferred:
        cost *= math.exp(-math.tanh(sum(w for t, w in preferred.items() if t in row["taints"])))
    return -cost


weight = st.floats(0, 20, allow_nan=False)
row = st.fixed_dictionaries({
    "active": st.integers(0, 100_000), "requests": st.integers(0, 200), "device": st.integers(0, 20_000), "host": st.integers(0, 5_000),
    "disk": st.integers(0, 5_000), "shared": st.integers(0, 5_000), "blocks": st.integers(0, 10_000), "taints": st.lists(st.sampled_from("abc"), unique=True).map(tuple),
})
options = st.fixed_dictionaries({
    "overlap_credit": weight, "credit_decay": weight, "prefill_scale": weight, "request_weight": weight, "host_weight": weight, "disk_weight": weight,
    "shared_weight": weight, "track_prefill": st.booleans(),
})


@given(options, st.integers(1, 50_000), st.sampled_from([1, 16, 64]), st.lists(row, min_size=1, max_size=8), st.dictionaries(st.sampled_from("abc"), st.floats(-3, 3)),
       st.sampled_from(["aggregated", "decode"]))
def test_every_cost_is_that_of_the_formula(options, isl, size, rows, preferred, role):
    asked = RoutingRequest("r", "m", prompt_tokens=isl, role=role, hints=Hints(preferred_taints=preferred))
    got = KvCost(**options).score(asked, fleet(rows, size))
    assert list(got) == pytest.approx([literal(options, isl, size, rows, r, preferred, role) for r in rows], rel=1e-9, abs=1e-6)
