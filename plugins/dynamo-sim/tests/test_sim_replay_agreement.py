"""The replay agrees with NVIDIA Dynamo's own (`dynamo.replay`), for which PEERS names a folder: `make peers PEERS=dir`."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.config import Router, Use
from dynamo_core.plugins import Plugins
from dynamo_sim.replay.report import report
from dynamo_sim.replay.simulate import Options, simulate
from dynamo_sim.replay.synthetic import chats, prefixes
from dynamo_sim.replay.trace import Trace, read, write

PEER = Path(os.environ.get("PEERS", "/nowhere")) / "dyn/bin/python"
TRACE = os.environ.get("TRACE")
"""A recorded trace to compare on as well."""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEER.exists(), reason=f"no ai-dynamo at {PEER}: make peers PEERS=dir, then set PEERS")]

NATIVE = """
import json, sys
from dynamo.replay import run_trace_replay
from dynamo.llm import KvRouterConfig
path, workers, rate, scale = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
kv = {} if scale == "none" else {"router_mode": "kv_router", "router_config": KvRouterConfig(prefill_load_scale=float(scale))}
report = run_trace_replay([path], num_workers=workers, arrival_speedup_ratio=rate, trace_block_size=512, **kv)
print("REPORT " + json.dumps((report if isinstance(report, dict) else report.__dict__)["summary"]))
"""
STACKS = {"none": Use("round-robin"), "1": Use("kv"), "16": Use("kv", {"prefill_scale": 16.0})}


def native(path: Path, workers: int, rate: float, scale: str) -> dict[str, Any]:
    words = [str(PEER), "-c", NATIVE, str(path), str(workers), str(rate), scale]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, "DYN_LOG": "error"}, check=False)
    found = next((line for line in done.stdout.splitlines() if line.startswith("REPORT ")), None)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    summary: dict[str, Any] = json.loads(found[7:])
    return summary


@pytest.fixture(scope="module", params=["chats", "prefixes", "recorded"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Path]:
    if request.param == "recorded":
        if not TRACE:
            pytest.skip("TRACE names no recorded trace")
        return read(Path(TRACE)), Path(TRACE)
    made = chats(3000, rate=6.0, first=6000, more=1500, seed=11) if request.param == "chats" else prefixes(3000, rate=8.0, own=4000, seed=11)
    path = tmp_path_factory.mktemp("trace") / f"{request.param}.jsonl"
    # The peer reads whole milliseconds, and knows sessions only as turns that wait for each other.
    made = Trace(made.arrival.round(), made.prompt, made.output, made.start, made.ids)
    write(made, path)
    return read(path), path


@pytest.mark.parametrize("scale", STACKS)
@pytest.mark.parametrize(("workers", "rate"), [(4, 1.0), (8, 2.0)])
def test_mean_ttft_agrees_within_five_per_cent(trace: tuple[Trace, Path], workers: int, rate: float, scale: str) -> None:
    requests, path = trace
    theirs = native(path, workers, rate, scale)
    ours = report("ours", requests, simulate(requests, Router(use=STACKS[scale]), Plugins.load(), Options(workers=workers, rate=rate)))
    print(f"TTFT {ours.ttft_ms.mean:.1f} / {theirs['mean_ttft_ms']:.1f}, ITL {ours.itl_ms.mean:.2f} / {theirs['mean_itl_ms']:.2f}, "
          f"e2e {ours.e2e_ms.mean:.1f} / {theirs['mean_e2e_latency_ms']:.1f}, hit {ours.hit_rate:.4f} / {theirs['prefix_cache_reused_ratio']:.4f}")
    assert ours.requests - ours.refused == theirs["completed_requests"]
    assert ours.ttft_ms.mean == pytest.approx(theirs["mean_ttft_ms"], rel=0.05)
    assert ours.e2e_ms.mean == pytest.approx(theirs["mean_e2e_latency_ms"], rel=0.05)
    assert ours.itl_ms.mean == pytest.approx(theirs["mean_itl_ms"], rel=0.05)
