"""Traces: what is read is what was written, and what is wrong has a line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_core.errors import ConfigError
from dynamo_sim.replay.synthetic import KINDS
from dynamo_sim.replay.trace import Trace, read, write


def line(**changes: Any) -> str:
    return json.dumps({"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2], **changes})


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def same(a: Trace, b: Trace) -> bool:
    return all(np.array_equal(x, y) for x, y in ((a.arrival, b.arrival), (a.prompt, b.prompt), (a.output, b.output), (a.start, b.start), (a.ids, b.ids)))


def test_equal_ids_at_equal_places_give_equal_keys(tmp_path: Path) -> None:
    trace = read(written(tmp_path, line(hash_ids=[7, 8]), line(hash_ids=[7, 9]), line(hash_ids=[9, 8])))
    first, second, third = (trace.keys(i, 64).tolist() for i in range(3))
    assert len(first) == 1000 // 64
    assert first[:8] == second[:8]
    assert not set(first[8:]) & set(second[8:])
    assert not set(first[:8]) & set(third)
    assert len(set(first + second + third)) == 8 + 7 + 7 + 15


def test_requests_are_put_in_order_of_arrival_and_start_at_zero(tmp_path: Path) -> None:
    trace = read(written(tmp_path, line(timestamp=900, hash_ids=[1, 2]), line(timestamp=500, hash_ids=[3, 4], output_length=9)))
    assert trace.arrival.tolist() == [0, 400]
    assert trace.output.tolist() == [9, 5]
    assert trace.ids.tolist() == [3, 4, 1, 2]


def test_a_later_turn_waits_for_the_turn_before_it(tmp_path: Path) -> None:
    trace = read(written(tmp_path, line(session_id="a"), line(timestamp=10), line(timestamp=None, session_id="a", delay=250)))
    assert trace.after is not None
    assert trace.session is not None
    assert trace.after.tolist() == [-1, -1, 0]
    assert trace.arrival.tolist() == [0, 10, 250]
    assert trace.session.tolist() == [0, -1, 0]


def test_a_limit_reads_the_first_requests(tmp_path: Path) -> None:
    path = written(tmp_path, line(), line(), "this is never read")
    assert len(read(path, limit=2)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_traces_survive_a_file_and_repeat_by_seed(tmp_path: Path, kind: str) -> None:
    trace = KINDS[kind](300, seed=5)
    assert len(trace) == 300
    write(trace, tmp_path / "t.jsonl")
    again = read(tmp_path / "t.jsonl")
    assert same(trace, again)
    assert same(trace, KINDS[kind](300, seed=5))
    assert not same(trace, KINDS[kind](300, seed=6))
    if trace.after is not None:
        assert again.after is not None
        assert np.array_equal(trace.after, again.after)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "truncated"),
        (line(input_length=0), "at least one token"),
        (line(output_length=-1), "output_length is -1"),
        (line(hash_ids=[1]), "there are 1 hash_ids"),
        (line(hash_ids=[1, 2, 3]), "there are 3 hash_ids"),
        (line(hash_ids=[1, -2]), "whole numbers"),
        (line(hash_ids=[1, "x"]), "hash_ids"),
        (line(timestamp=None), "neither a timestamp nor a session_id"),
        (line(timestamp=-5), "milliseconds"),
        (json.dumps({"timestamp": 0}), "missing required field"),
    ],
)
def test_what_is_wrong_has_a_line(tmp_path: Path, bad: str, said: str) -> None:
    path = written(tmp_path, line(), bad, line(), bad)
    with pytest.raises(ConfigError) as caught:
        read(path)
    problems = caught.value.problems
    assert [p.where for p in problems] == [f"{path}:2", f"{path}:4"]
    assert said in problems[0].what.lower() or said in problems[0].what


def test_an_empty_or_absent_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no requests"):
        read(written(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "nothing.jsonl")
