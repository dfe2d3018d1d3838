"""Replays: production routers before simulated engines, the same every time."""

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from dynamo_core.cli import main
from dynamo_core.config import Router, Use
from dynamo_core.config.schema import Queue
from dynamo_core.errors import ConfigError
from dynamo_core.plugins import Plugins
from dynamo_sim.replay.command import resolve
from dynamo_sim.replay.report import Report, report
from dynamo_sim.replay.simulate import Options, Outcome, simulate
from dynamo_sim.replay.synthetic import agents, chats, prefixes
from dynamo_sim.replay.trace import Line, Trace, build, write
from dynamo_sim.scheduler import Limits


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return Plugins.load()


def replayed(plugins: Plugins, trace: Trace, stack: Use | Router, **options: Any) -> tuple[Outcome, Report]:
    router = stack if isinstance(stack, Router) else Router(use=stack)
    outcome = simulate(trace, router, plugins, Options(**{"workers": 3, **options}))
    return outcome, report("it", trace, outcome)


@pytest.mark.parametrize("stack", [Use("round-robin"), Use("random"), Use("kv"), Use("kv-plus")])
def test_two_runs_are_the_same_to_the_bit(plugins: Plugins, stack: Use) -> None:
    trace = chats(250, rate=12.0, seed=3)
    first, second = (replayed(plugins, trace, stack, frontends=2, event_lag_ms=20.0, seed=4)[1] for _ in range(2))
    assert first == second
    assert not first.faults
    assert not first.refused


def test_the_seed_decides_what_chance_decides(plugins: Plugins) -> None:
    trace = chats(100, seed=3)
    first, second = (replayed(plugins, trace, Use("random"), seed=seed)[0].worker for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_every_request_is_served_once_and_in_causal_order(plugins: Plugins) -> None:
    trace = prefixes(300, rate=20.0, seed=1)
    outcome, about = replayed(plugins, trace, Use("kv-plus"))
    assert about.requests == 300
    assert np.array_equal(outcome.arrived, trace.arrival)
    assert np.all(outcome.first > outcome.arrived)
    assert np.all((outcome.done > outcome.first) | (trace.output == 1))
    assert np.all(outcome.cached < trace.prompt)
    assert set(outcome.worker.tolist()) == {0, 1, 2}


def test_an_index_without_lag_predicts_what_the_engines_find(plugins: Plugins) -> None:
    """Only what an engine evicts between decision and admission may be missing."""
    outcome, about = replayed(plugins, agents(300, rate=6.0, seed=2), Use("kv"))
    assert about.hit_rate > 0.5
    assert about.predicted_hit_rate == pytest.approx(about.hit_rate, abs=0.02)
    assert np.mean(outcome.predicted <= outcome.cached) > 0.97


def test_late_news_of_caches_costs_hits_only_if_nothing_is_foretold(plugins: Plugins) -> None:
    trace = agents(300, rate=6.0, seed=2)
    blind = Router(use=Use("kv"), facts=(Use("kv-index", {"predict": 0.0}),))
    now, late = (replayed(plugins, trace, blind, event_lag_ms=lag)[1].hit_rate for lag in (0.0, 60_000.0))
    assert late < now


@pytest.mark.parametrize("more", [0, 200])
@pytest.mark.parametrize("opening", [200, 4000, 30_000])
def test_who_is_alone_in_the_fleet_stays_with_its_worker(plugins: Plugins, opening: int, more: int) -> None:
    """However many workers there are to go to, and however often the same prompt comes back, longer or not."""
    lengths = [opening + more * turn for turn in range(40)]
    lines = [Line(tokens, 20, list(range(-(-tokens // 512))), 1500.0 * turn) for turn, tokens in enumerate(lengths)]
    outcome, _ = replayed(plugins, build(lines), Use("kv-plus"), workers=24)
    assert len(set(outcome.worker.tolist())) == 1


def test_kv_routing_finds_more_than_round_robin(plugins: Plugins) -> None:
    trace = chats(400, rate=12.0, seed=7)
    blind, seeing = (replayed(plugins, trace, Use(name))[1] for name in ("round-robin", "kv"))
    assert seeing.hit_rate > 1.2 * blind.hit_rate
    assert seeing.ttft_ms.mean < blind.ttft_ms.mean


def test_where_all_share_one_cache_it_does_not_matter_who_reads_a_prompt(plugins: Plugins) -> None:
    trace = chats(300, rate=4.0, seed=7)
    blind, shared = (replayed(plugins, trace, Use("round-robin"), shared_cache=both)[1] for both in (False, True))
    seeing, seeing_shared = (replayed(plugins, trace, Use("kv"), shared_cache=both)[1] for both in (False, True))
    assert shared.hit_rate > max(1.2 * blind.hit_rate, seeing.hit_rate)
    assert shared.hit_rate == pytest.approx(seeing_shared.hit_rate, abs=0.01)
    assert seeing_shared.predicted_hit_rate == pytest.approx(seeing_shared.hit_rate, abs=0.01)


@pytest.mark.parametrize("blocks", [40, 60, 90])
def test_who_waits_for_blocks_of_a_shared_cache_gets_those_that_another_worker_gives_back(plugins: Plugins, blocks: int) -> None:
    """Fewer blocks than are wanted at once: workers wait for each other's."""
    random = np.random.default_rng(blocks)
    lines = [Line(int(random.integers(64, 2500)), int(random.integers(1, 900)), [*range(10 * i, 10 * i + 5)], float(i)) for i in range(200)]
    outcome, _ = replayed(plugins, build(lines), Use("round-robin"), shared_cache=True, limits=Limits(total_blocks=blocks, block_size=64))
    fits = np.array([line.input_length + line.output_length for line in lines]) <= blocks * 64
    assert np.isnan(outcome.done).tolist() == (~fits).tolist()
    assert outcome.preempted > 0


def test_a_closed_loop_keeps_so_many_requests_in_progress(plugins: Plugins) -> None:
    trace = chats(120, seed=1)
    outcome, _ = replayed(plugins, trace, Use("least-loaded"), concurrency=7)
    events = sorted([(t, 1) for t in outcome.arrived] + [(t, -1) for t in outcome.done], key=lambda e: (e[0], e[1]))
    assert max(np.cumsum([change for _, change in events])) == 7
    assert np.count_nonzero(outcome.arrived == 0.0) == 7


def test_a_later_turn_comes_so_long_after_the_end_of_the_one_before(plugins: Plugins) -> None:
    trace = agents(150, seed=9)
    outcome, _ = replayed(plugins, trace, Use("kv"))
    assert trace.after is not None
    later = np.flatnonzero(trace.after >= 0)
    assert len(later) > 50
    assert np.allclose(outcome.arrived[later], outcome.done[trace.after[later]] + trace.arrival[later])


def test_arrivals_come_faster_by_the_rate(plugins: Plugins) -> None:
    trace = chats(50, seed=1)
    outcome, _ = replayed(plugins, trace, Use("round-robin"), rate=4.0)
    assert np.allclose(outcome.arrived, trace.arrival / 4.0)


def test_a_request_that_fits_nowhere_is_refused_and_the_rest_is_served(plugins: Plugins) -> None:
    lines = [Line(100, 5, [1], 0.0), Line(5000, 5, list(range(10, 20)), 1.0), Line(100, 5, [2], 2.0)]
    outcome, about = replayed(plugins, build(lines), Use("round-robin"), limits=Limits(total_blocks=32, block_size=64))
    assert about.refused == 1
    assert np.isnan(outcome.done).tolist() == [False, True, False]
    assert outcome.worker.tolist()[1] == -1


def test_requests_wait_in_the_queue_of_the_router_and_short_ones_pass(plugins: Plugins) -> None:
    lines = [Line(8000, 2, [k * 100 + i for i in range(16)], 0.0) for k in range(3)] + [Line(600, 2, [900, 901], 1.0)]
    queue = Queue(prefill_tokens=0, order="shortest")
    plain, held = (replayed(plugins, build(lines), Router(use=Use("kv"), queue=q), workers=1)[0] for q in (None, queue))
    assert plain.first[3] > plain.first[2]
    assert held.first[3] < held.first[1]
    assert np.all(held.first > 0)


def test_what_waits_too_long_is_refused_even_when_nothing_else_happens(plugins: Plugins) -> None:
    lines = [Line(8000, 3000, list(range(16)), 0.0), Line(8000, 2, list(range(100, 116)), 1.0)]
    never = Router(use=Use("kv"), queue=Queue(prefill_tokens=0, max_wait=0.05))
    outcome, about = replayed(plugins, build(lines), never, workers=1)
    assert about.refused == 1
    assert np.isnan(outcome.first[1])


def test_load_reports_reach_policies_that_want_them(plugins: Plugins) -> None:
    stack = Router(use=Use("kv"), filters=(Use("not-full"),))
    trace = chats(100, rate=20.0, seed=1)
    _, about = replayed(plugins, trace, stack)
    assert not about.faults
    assert about.requests == 100


def test_frontends_that_tell_each_other_do_not_herd(plugins: Plugins) -> None:
    trace = chats(400, rate=24.0, seed=1)
    told, alone = (replayed(plugins, trace, Use("least-loaded"), frontends=4, share=share)[1] for share in (True, False))
    assert told.ttft_ms.mean < alone.ttft_ms.mean


def test_how_slow_this_machine_is_decides_nothing(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    assert not replayed(plugins, chats(60, seed=1), Use("kv-plus"))[1].faults


def test_the_report_adds_up(plugins: Plugins) -> None:
    trace = prefixes(200, rate=10.0, seed=1)
    outcome, about = replayed(plugins, trace, Use("kv"))
    assert about.ttft_ms.mean == pytest.approx(float(np.mean(outcome.first - outcome.arrived)))
    assert about.e2e_ms.p99 == pytest.approx(float(np.percentile(outcome.done - outcome.arrived, 99)))
    assert about.itl_ms.mean == pytest.approx(float((outcome.done - outcome.first).sum() / (trace.output - 1).sum()))
    assert sum(outcome.itl.values()) == int((trace.output - 1).sum())
    assert about.output_tokens_per_s == pytest.approx(trace.output.sum() / about.duration_s)
    assert about.busy_spread >= 1.0


# ------------------------------------------------------------------ the command


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write(chats(80, rate=10.0, seed=1), path)
    return path


def test_the_command_compares_stacks_from_files_and_by_name(trace_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = tmp_path / "mine.toml"
    stack.write_text('[router]\nuse = "least-loaded"\n')
    assert main(["replay", str(trace_file), "--stack", "kv:prefill_scale=16", "--stack", str(stack), "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "kv:prefill_scale=16" in out
    assert "mine.toml" in out
    assert "80 requests, 2 workers" in out
    assert "time to first token" in out


def test_the_command_prints_json_that_repeats(trace_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["replay", "trace", str(trace_file), "--stack", "kv-plus", "--timing", "roofline", "--json"]
    said: list[Any] = []
    for _ in range(2):
        assert main(words) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    assert said[0]["options"]["timing"] == "roofline"
    assert said[0]["stacks"][0]["requests"] == 80
    assert set(said[0]["stacks"][0]) == {a.name for a in attrs.fields(Report)}


@pytest.mark.parametrize(("output", "unknown"), [(1, "itl_ms"), (10**11, "ttft_ms")])
def test_json_is_json_also_where_there_is_nothing_to_measure(output: int, unknown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 100, "output_length": output, "hash_ids": [1]}) + "\n")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    main(["replay", str(path), "--json"])
    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["stacks"][0][unknown]["mean"] is None


def test_the_command_draws(trace_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra dynamo-sim[plot] is not installed")
    picture = tmp_path / "replay.png"
    assert main(["replay", str(trace_file), "--stack", "kv", "--stack", "random", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stack", "kw"], "kw"),
        (["--stack", "kv:no_such_weight=1"], "no_such_weight"),
        (["--stack", "nothing.toml"], "nothing.toml"),
        (["--workers", "0"], "workers"),
        (["--block-size", "48"], "--block-size (48) must divide"),
        (["--max-batched-tokens", "100"], "--max-batched-tokens (100)"),
        (["--plot", "/no/such/folder/x.png"], "/no/such/folder"),
        (["--plot", "/"], "this is a directory"),
        (["--engine-speedup", "inf"], "engine_speedup"),
    ],
)
def test_what_cannot_be_replayed_is_said_before_it_starts(trace_file: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace_file), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_neither_trace_nor_decisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear router,\n")
    assert main(["replay", str(path)]) == 2
    assert "letter.txt:1" in capsys.readouterr().err


def test_a_policy_by_name_takes_options() -> None:
    router, _ = resolve("kv:prefill_scale=16,temperature=0.5")
    assert router.use == Use("kv", {"prefill_scale": 16, "temperature": 0.5})
    with pytest.raises(ConfigError):
        resolve("kv:prefill_scale=high")
