"""The scorer `kv-plus` against its formula as the README has it, written out literally for one worker at a time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.routing.contract import Fact, Fleet, RoutingRequest, Worker
from dynamo_core.routing.facts import BLOCK_SIZE, OVERLAP_TOKENS, TAINTS, TOTAL_BLOCKS
from dynamo_core.types import Hints
from dynamo_kv_router import load_facts as f
from dynamo_kv_router.facts import DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS, HOST_OVERLAP_TOKENS
from dynamo_kv_router.plus import KvPlus

FACTS: dict[str, Fact[Any]] = {
    "device": OVERLAP_TOKENS, "host": HOST_OVERLAP_TOKENS, "disk": DISK_OVERLAP_TOKENS, "external": EXTERNAL_OVERLAP_TOKENS,
    "active": f.ACTIVE_OVERLAP_TOKENS, "backlog": f.BACKLOG, "recent": f.RECENT, "decoding": f.DECODING, "context": f.CONTEXT, "generated": f.GENERATED,
    "potential": f.POTENTIAL_BLOCKS, "pass": f.PASS_MS, "prefill": f.PREFILL_MS, "attention": f.ATTENTION_MS, "step": f.STEP_MS,
    "sequence": f.SEQUENCE_MS, "decode": f.DECODE_MS, "output": f.OUTPUT_TOKENS, "size": BLOCK_SIZE, "total": TOTAL_BLOCKS,
}
PRICES: dict[str, float] = {"pass": 10, "prefill": 0.02, "attention": 1e-6, "step": 7, "sequence": 0.05, "decode": 5e-5, "output": 400, "size": 64, "total": 10_000}


def fleet(rows: list[dict[str, float]]) -> Fleet:
    columns: dict[Fact[Any], tuple[Any, ...]] = {fact: tuple((PRICES | row).get(name, 0) for row in rows) for name, fact in FACTS.items()}
    return Fleet([Worker(i) for i in range(len(rows))], {**columns, TAINTS: ((),) * len(rows)})


def literal(w: KvPlus, prompt: int, row: dict[str, float], mean: float) -> float:
    """:param mean: of `recent` over the candidates."""
    r = dict.fromkeys(FACTS, 0.0) | PRICES | row
    cached = max(r["device"], r["active"]) + w.host_weight * r["host"] + w.disk_weight * r["disk"] + w.external_weight * r["external"]
    uncached = max(1.0, prompt - cached)
    work = r["pass"] + uncached * (r["prefill"] + r["attention"] * (prompt - uncached / 2))
    cost = w.backlog_weight * r["backlog"] + work * (1 + w.work_weight + w.slowdown_weight * r["decoding"])
    context = r["decode"] * (r["context"] + r["decoding"] * prompt / 2) + r["sequence"] * r["decoding"] * 1.5
    cost += w.decode_weight * max(r["output"], 300) * context
    whole = prompt * (r["prefill"] + r["attention"] * prompt / 2)
    cost += w.recent_weight * whole * r["recent"] / (mean + whole)
    missing = r["size"] * r["potential"] + r["generated"] - 0.97 * r["size"] * r["total"]
    if missing > 0:
        step = r["step"] + r["sequence"] * r["decoding"] + r["decode"] * r["context"]
        cost += w.memory_weight * missing / max(1, r["context"]) * r["output"] * step
    return -cost


tokens = st.integers(0, 30_000)
row = st.fixed_dictionaries({
    "device": tokens, "host": tokens, "disk": tokens, "external": tokens, "active": tokens, "backlog": st.floats(0, 5_000), "recent": st.floats(0, 50_000), "decoding": st.integers(0, 200),
    "context": st.integers(0, 900_000), "generated": st.integers(0, 90_000), "potential": st.integers(0, 12_000), "output": st.floats(1, 2_000),
})
weight = st.floats(0, 10)
weights = st.builds(
    KvPlus, backlog_weight=weight, work_weight=weight, slowdown_weight=weight, decode_weight=weight, recent_weight=weight, memory_weight=weight,
    host_weight=weight, disk_weight=weight, external_weight=weight,
)


@given(weights, st.integers(1, 50_000), st.lists(row, min_size=1, max_size=6))
def test_every_cost_is_that_of_the_formula(policy, prompt, rows):
    got = policy.score(RoutingRequest("r", "m", prompt_tokens=prompt), fleet(rows))
    mean = sum(r["recent"] for r in rows) / len(rows)
    assert list(got) == pytest.approx([literal(policy, prompt, r, mean) for r in rows], rel=1e-9, abs=1e-6)


def best(rows: list[dict[str, float]], prompt: int = 8_000) -> int:
    scores = list(KvPlus().score(RoutingRequest("r", "m", prompt_tokens=prompt), fleet(rows)))
    return scores.index(max(scores))


def test_a_prompt_is_computed_again_elsewhere_rather_than_wait_long_for_the_worker_that_has_it():
    warm, cold = {"device": 7_900}, {}
    assert best([warm, cold]) == 0
    assert best([warm | {"backlog": 50.0}, cold]) == 0
    assert best([warm | {"backlog": 400.0}, cold]) == 1


def test_what_is_to_be_computed_goes_where_it_delays_fewer_answers():
    busy, calm = {"decoding": 60, "context": 100_000}, {"decoding": 5, "context": 100_000}
    assert best([busy, calm]) == 1
    assert best([busy | {"device": 7_900}, calm]) == 0


def test_a_worker_that_was_sent_far_more_of_late_than_others_leaves_them_prompts_that_it_has():
    warm, cold = {"device": 7_900, "recent": 5_000.0}, {"recent": 1_000.0}
    assert best([warm, cold]) == 0
    assert best([warm, *[cold] * 11]) == 0
    assert best([warm | {"recent": 30_000.0}, *[cold] * 11]) != 0


def test_one_prompt_in_an_idle_fleet_is_no_reason_to_leave_its_worker():
    """However large the fleet: whoever is alone in it keeps its worker."""
    alone = {"device": 7_900, "recent": 200.0}
    assert best([alone, *[{}] * 63]) == 0


def test_prices_of_nothing_are_no_reason_to_divide_by_it():
    free = dict.fromkeys(("pass", "prefill", "attention", "step", "sequence", "decode"), 0.0)
    scores = KvPlus().score(RoutingRequest("r", "m", prompt_tokens=100), fleet([free, free | {"backlog": 5.0}]))
    assert list(scores) == [0.0, -15.0]


def test_a_full_cache_is_worse_than_one_without_the_prompt():
    assert best([{"device": 7_900, "potential": 10_000, "context": 600_000}, {"potential": 5_000, "context": 320_000}]) == 1


def test_lengths_that_the_caller_expects_count_instead_of_the_mean():
    rows = [{"device": 4_000, "context": 250_000}, {"context": 50_000}]
    scores = [KvPlus().score(RoutingRequest("r", "m", prompt_tokens=8_000, hints=Hints(expected_output_tokens=n)), fleet(rows)) for n in (10, 4_000)]
    assert scores[0][0] > scores[0][1]
    assert scores[1][0] < scores[1][1]
