"""The benchmark with real processes, on a few seconds of traffic: a planner that is told what comes, real workers, and clients that count."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest

from benchmarks import planner_site as site
from benchmarks.planner_loads import LEAD, Rush, rush
from benchmarks.planner_processes import TRIALS, rows, run

GRID = ("--inputs=1000,4000", "--contexts=4000", "--concurrency=1,8", "--repeat=1", "--output=16")


def seconds(load: Rush, start: int, end: int) -> Rush:
    return attrs.evolve(load, requests=[(at - start, prompt, tokens) for at, prompt, tokens in load.requests if start <= at < end], rates=load.rates[start:end], lead=1.0)


@pytest.mark.slow
def test_a_trial_with_real_processes_counts_what_clients_saw_and_what_workers_cost(tmp_path: Path):
    load = seconds(rush(1, scale=0.1), LEAD - 2, LEAD + 9)
    assert np.ptp(load.rates) > 10, "the load must rise, or there is nothing to plan"
    oracle = next(trial for trial in TRIALS if trial.kind == "oracle")
    found = run(oracle, load, site.profile(tmp_path / "profile", GRID), tmp_path / "trial")
    assert found.failed == 0
    assert found.requests == sum(at >= load.lead for at, _, _ in load.requests) >= found.on_time
    assert max(count for _, count in found.desired) > 2, "the oracle has seen the rise and has not scaled"
    seconds_measured = len(load.rates) - load.lead
    assert 0.8 * seconds_measured * 2 < found.gpu_seconds < seconds_measured * 8
    assert rows("a trial", {oracle.name: found}).count("\n") == 2
