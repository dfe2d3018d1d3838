"""What one replica can do: from a profile of ours, from one of Dynamo's, and learned."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.errors import ConfigError
from dynamo_planner.contract import Load
from dynamo_planner.performance.live import Live
from dynamo_planner.performance.profile import DecodePoint, Measured, PrefillPoint, Profile, load, read, write
from dynamo_planner.performance.surface import Curve, Surface

NUMBERS = st.floats(0.001, 1e4, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(points=st.lists(st.tuples(st.floats(1, 1e4), NUMBERS), min_size=1, max_size=12), x=st.floats(0, 3e4), more=st.floats(0, 1e4))
def test_a_curve_never_falls_however_noisy_its_points(points, x, more):
    curve = Curve(points)
    assert 0 <= curve(x) <= curve(x + more) * (1 + 1e-9) + 1e-6


@settings(max_examples=80, deadline=None)
@given(points=st.lists(st.tuples(st.sampled_from([100.0, 500.0, 900.0]), st.floats(1, 300), NUMBERS), min_size=1, max_size=20), x=st.floats(0, 2e3),
       y=st.floats(0, 900), dx=st.floats(0, 1e3), dy=st.floats(0, 500))
def test_a_surface_never_falls_in_either_direction(points, x, y, dx, dy):
    surface = Surface(points)
    here = surface(x, y)
    assert here <= surface(x + dx, y) * (1 + 1e-9) + 1e-6
    assert here <= surface(x, y + dy) * (1 + 1e-9) + 1e-6


def test_points_that_are_monotone_are_met_exactly():
    assert [Curve([(100, 1.0), (200, 1.5), (400, 3.0)])(x) for x in (100, 200, 400)] == pytest.approx([1.0, 1.5, 3.0])
    surface = Surface([(c, n, c * n) for c in (1, 2, 3) for n in (1, 4, 8)])
    assert [surface(c, n) for c in (1, 2, 3) for n in (1, 4, 8)] == pytest.approx([c * n for c in (1, 2, 3) for n in (1, 4, 8)])
    assert Curve([(100, 1.0), (200, 2.0)])(400) == pytest.approx(4.0)


PROFILE = Profile(model="m", prefill=(PrefillPoint(100, 0.01), PrefillPoint(1000, 0.05)), kv_tokens=100_000, max_sequences=64,
                  decode=tuple(DecodePoint(c, n, 0.005 + 1e-4 * n + 1e-9 * c * n) for c in (500, 4000) for n in (1, 16, 32)))


def test_a_profile_that_is_written_is_read_again(tmp_path: Path):
    write(PROFILE, tmp_path / "p.json")
    assert read(tmp_path / "p.json") == PROFILE
    measured = load(tmp_path / "p.json")
    assert measured.prefill(1000) == pytest.approx(0.05)
    assert measured.itl(500, 16) == pytest.approx(0.005 + 1.6e-3 + 8e-6)
    assert measured.most_sequences(1000) == 64
    assert measured.most_sequences(50_000) == 2
    assert "p.json" in measured.source


@pytest.mark.parametrize(("content", "said"), [
    ("{", "not understood"), ('{"version": 99, "prefill": [], "decode": []}', "version 99"), ('{"version": 1, "prefill": [], "decode": []}', "no points"),
    ('{"version": 1, "prefill": [], "decode": [], "prefil": 1}', "prefil"),
])
def test_a_file_that_is_no_profile_is_the_operators_mistake(tmp_path: Path, content: str, said: str):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="dynamo profile"):
        load(tmp_path / "absent.json")


def test_profiles_of_dynamos_profiler_are_read(tmp_path: Path):
    prefill = {"prefill_isl": [100, 1000, 4000], "prefill_ttft": [12.0, 50.0, 210.0], "prefill_thpt_per_gpu": [1, 2, 3]}
    usage, context = (axis.ravel() for axis in np.meshgrid([0.1, 0.5, 0.9], [1000.0, 4000.0]))
    decode = {"x_kv_usage": usage, "y_context_length": context, "z_itl": 5 + 20 * usage, "z_thpt_per_gpu": usage, "max_kv_tokens": [400_000]}
    for name, arrays in (("prefill", prefill), ("decode", decode)):
        folder = tmp_path / "npz" / f"selected_{name}_interpolation"
        folder.mkdir(parents=True)
        np.savez(folder / "raw_data.npz", **arrays)
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{name}_raw_data.json").write_text(json.dumps({key: np.asarray(values).tolist() for key, values in arrays.items()}))
    for path in (tmp_path / "npz", tmp_path / "json", tmp_path / "json" / "decode_raw_data.json"):
        measured = load(path)
        assert measured.prefill(1000) == pytest.approx(0.05)
        assert measured.itl(1000, 200) == pytest.approx(0.015, rel=0.02), "half of 400,000 tokens are 200 sequences of 1,000"
        assert measured.most_sequences(4000) == pytest.approx(100)
    (tmp_path / "json" / "decode_raw_data.json").unlink()
    with pytest.raises(ConfigError, match=r"neither .* nor decode_raw_data.json"):
        load(tmp_path / "json")


def test_profiles_of_dynamos_simulator_are_read(tmp_path: Path):
    active, contexts = np.array([1000.0, 50_000.0, 100_000.0]), np.array([500.0, 1000.0])
    np.savez(tmp_path / "p.npz", prefill_isl=[100, 1000], prefill_ttft_ms=[10, 60], decode_active_kv_tokens=active, decode_context_length=contexts,
             decode_itl=np.add.outer(5 + active / 10_000, contexts * 0))
    measured = load(tmp_path / "p.npz")
    assert measured.prefill(1000) == pytest.approx(0.06)
    assert measured.itl(1000, 50) == pytest.approx(0.010)
    np.savez(tmp_path / "bad.npz", prefill_isl=[1], prefill_ttft_ms=[1])
    with pytest.raises(ConfigError, match="decode_active_kv_tokens"):
        load(tmp_path / "bad.npz")


def test_performance_is_learned_from_what_is_served(engine):
    chance, live = random.Random(1), Live(samples=8)
    for i in range(60):
        rate, prompt, output, replicas = chance.uniform(1, 40), chance.uniform(500, 4000), chance.uniform(50, 300), 4
        itl = 0.01
        for _ in range(50):
            itl = engine.itl(prompt + output / 2, rate * output * itl / replicas)
        queued = 0.0 if i % 2 else chance.expovariate(1 / 0.05)
        live.learn(Load(i, 60.0, rate, prompt, output, ttft=engine.prefill(prompt) + queued, itl=itl), replicas, replicas)
        assert (live.performance() is None) == (i < 7)
    learned = live.performance()
    assert learned.itl(2000, 30) == pytest.approx(engine.itl(2000, 30), rel=0.05)
    assert learned.prefill(2000) == pytest.approx(engine.prefill(2000), rel=0.15)
    assert "60 intervals" in learned.source


def test_a_queue_is_not_taken_for_slow_prompts_even_when_nothing_else_was_seen(engine):
    live = Live(samples=8)
    for i in range(20):
        live.learn(Load(i, 60.0, 20.0, 500.0, 60.0, ttft=5.0 + i, itl=0.02), 4, 1)
    assert engine.prefill(500) < live.performance().prefill(500) <= 1 / 20


def test_intervals_without_traffic_teach_nothing():
    live = Live(samples=4)
    for i in range(20):
        live.learn(Load(i, 60.0), 2, 2)
    assert "0 of 4" in live.problem()
    assert live.performance() is None


def test_a_profile_far_beyond_its_grid_is_not_believed():
    assert Measured.of(Profile(prefill=PROFILE.prefill, decode=PROFILE.decode), "x").most_sequences(10) == 4 * 32
