"""Decisions reach their file soon, with their outcome, and never hold anything up."""

import math
import time
from pathlib import Path

import attrs

from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.record import Decision
from dynamo_core.routing.recorder import Recorder
from dynamo_core.types import Hints


def decision(name: str) -> Decision:
    return Decision(name, RoutingRequest(name, "m", prompt_tokens=1), Worker(1), (Worker(1),), ("w",), {}, [], [0], {}, [0.0], [], 1, "hash", 1, time.time())


def written(path: Path, *, least: int) -> list[Decision]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        lines = path.read_bytes().splitlines() if path.exists() else []
        if len(lines) >= least:
            return [Decision.from_json(line) for line in lines]
        time.sleep(0.02)
    raise AssertionError(f"{path} does not have {least} decisions")


def test_a_few_decisions_are_in_the_file_while_the_process_goes_on(tmp_path: Path):
    recorder = Recorder(tmp_path / "d.jsonl")
    records = [decision(f"{i}") for i in range(3)]
    for record in records:
        recorder.record(record)
        record.outcome = "done"
    assert [(d.id, d.outcome) for d in written(recorder.path, least=3)] == [("0", "done"), ("1", "done"), ("2", "done")]
    recorder.close()


def test_a_decision_waits_for_its_outcome_but_not_for_ever(tmp_path: Path):
    recorder = Recorder(tmp_path / "d.jsonl", lag=1, patience=600)
    recorder.record(open_ := decision("open"))
    recorder.record(decision("later"))
    assert [d.id for d in written(recorder.path, least=1)] == ["open"]  # one may wait, and two do
    recorder.close()
    patient = Recorder(tmp_path / "e.jsonl", patience=0.1)
    patient.record(open_)
    assert written(patient.path, least=1)[0].outcome == ""
    patient.close()


def test_the_end_writes_what_is_left(tmp_path: Path):
    recorder = Recorder(tmp_path / "d.jsonl", patience=600)
    recorder.record(decision("open"))
    recorder.close()
    assert [d.id for d in written(recorder.path, least=1)] == ["open"]


def test_a_file_that_cannot_be_written_is_said_and_what_was_lost_is_counted(tmp_path: Path):
    (tmp_path / "file").write_text("")
    recorder = Recorder(tmp_path / "file" / "d.jsonl")
    recorder.record(decision("lost"))
    recorder.close()
    assert recorder.dropped == 1
    assert "decisions cannot be recorded" in recorder.problem()


def test_a_decision_whose_request_has_ended_does_not_wait_for_one_that_goes_on(tmp_path: Path):
    recorder = Recorder(tmp_path / "d.jsonl", patience=600)
    recorder.record(decision("long"))
    recorder.record(short := decision("short"))
    short.outcome = "done"
    assert [d.id for d in written(recorder.path, least=1)] == ["short"]
    recorder.close()
    assert [d.id for d in written(recorder.path, least=2)] == ["short", "long"]


def test_a_decision_that_is_no_json_is_counted_and_those_after_it_are_written(tmp_path: Path):
    recorder = Recorder(tmp_path / "d.jsonl")
    odd = decision("odd")
    odd.request = attrs.evolve(odd.request, hints=Hints(preferred_taints={"a": math.nan}))
    for record in (odd, decision("next")):
        record.outcome = "done"
        recorder.record(record)
    assert [d.id for d in written(recorder.path, least=1)] == ["next"]
    recorder.record(later := decision("later"))
    later.outcome = "done"
    assert [d.id for d in written(recorder.path, least=2)] == ["next", "later"]
    assert recorder.dropped == 1
    recorder.close()
