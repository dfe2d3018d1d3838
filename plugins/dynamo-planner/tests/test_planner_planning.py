"""The whole planner on a fleet of the test's own: observe, decide, act, record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest

from dynamo_core.config import Use
from dynamo_core.errors import ConfigError, ConnectorUnavailable, ScaleRefused
from dynamo_core.plugins import Plugins
from dynamo_core.scaling import RoleState
from dynamo_planner import build
from dynamo_planner.config import Metrics, Planner
from dynamo_planner.contract import Load, Observation, WorkerReport
from dynamo_planner.explain.page import page
from dynamo_planner.explain.text import explain
from dynamo_planner.explain.what_if import changes, what_if
from dynamo_planner.planning import Missing, Planning
from dynamo_planner.record import read_journal


@attrs.define(eq=False)
class Fleet:
    """Starts replicas after `cold` seconds; is a source of load and of reports as well."""

    cold: float = 30.0
    rate: float = 1.0
    at: float = 0.0
    looked: float = 0.0
    desired: int = 1
    room: int = 1000
    """Replicas beyond this never start."""
    starting: list[float] = attrs.field(factory=list)
    reports_missing: int = 0
    held: float = 0.0
    broken: Exception | None = None
    blind: bool = False
    reasons: list[str] = attrs.field(factory=list)

    @property
    def ready(self) -> int:
        return min(self.room, self.desired - sum(when > self.at for when in self.starting))

    async def start(self) -> None: ...
    async def close(self) -> None: ...

    async def observe(self) -> Mapping[str, RoleState]:
        if self.blind:
            raise ConnectorUnavailable("the API server does not answer")
        starting = self.desired - self.ready
        return {"aggregated": RoleState(desired=self.desired, ready=self.ready, starting=starting, draining=0, gpus_per_replica=1, stable=not starting,
                                        reducible=max(0, self.desired - self.room))}

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        if self.broken is not None:
            raise self.broken
        self.reasons.append(reason)
        self.starting += [self.at + self.cold] * (targets["aggregated"] - self.desired)
        self.desired = targets["aggregated"]

    async def load(self, at: float) -> Load | None:
        if self.rate < 0:
            raise Missing("the load: Prometheus does not answer")
        before, self.looked = self.looked, at
        return None if at <= before else Load(at, at - before, self.rate, 1000.0 * bool(self.rate), 100.0 * bool(self.rate), held=self.held, ttft=0.1, itl=0.008)

    def reports(self, at: float) -> list[WorkerReport]:
        return [WorkerReport(f"w{i}", "aggregated", running=1, kv_share=0.3) for i in range(self.ready - self.reports_missing)]

    def problems(self) -> list[str]:
        return ["the events of backend do not arrive: no route"] if self.reports_missing else []


def planner(fleet: Fleet, engine, **changes) -> Planning:
    table = Planner(**{"metrics": Metrics(frontends=("http://x",)), "tick": 10.0, "interval": 30.0, "patience": 60.0, "itl": 0.02, "cold_start": 60.0, **changes})
    mind = build.mind(table, Plugins.load())
    mind.profile = engine
    return Planning(mind, fleet, fleet, fleet)


async def ticks(planning: Planning, fleet: Fleet, count: int, every: float = 10.0):
    for _ in range(count):
        fleet.at += every
        decision = await planning.tick(fleet.at)
    return decision


async def test_a_fleet_follows_the_load_up_at_once_and_down_with_patience(engine):
    fleet = Fleet()
    planning = planner(fleet, engine)
    await ticks(planning, fleet, 6)
    assert fleet.desired == 1
    fleet.rate = 120.0
    await ticks(planning, fleet, 9)
    high = fleet.desired
    assert high >= 3
    fleet.rate = 1.0
    await ticks(planning, fleet, 3)
    assert fleet.desired == high, "patience"
    await ticks(planning, fleet, 60)
    assert fleet.desired < high
    assert all("aggregated" in reason for reason in fleet.reasons)


async def test_nothing_is_decided_on_half_of_the_picture_and_the_missing_part_is_named(engine):
    fleet = Fleet(rate=200.0)
    planning = planner(fleet, engine, stuck_after=3)
    await ticks(planning, fleet, 2)
    for spoil, said in (({"rate": -1.0}, "Prometheus does not answer"), ({"blind": True}, "the API server does not answer"),
                        ({"reports_missing": 1}, "load reports: ")):
        kept = fleet.desired
        before = {name: getattr(fleet, name) for name in spoil}
        for name, value in spoil.items():
            setattr(fleet, name, value)
        decision = await ticks(planning, fleet, 3)
        assert decision.action == "skipped"
        assert any(said in part for part in decision.missing)
        assert said in explain(decision)
        assert fleet.desired == kept
        assert any("decisions in a row were skipped" in what for what in decision.stuck)
        for name, value in before.items():
            setattr(fleet, name, value)
        assert (await ticks(planning, fleet, 2)).action != "skipped"


async def test_a_dry_run_says_what_it_would_do_and_does_nothing(engine):
    fleet = Fleet(rate=200.0)
    decision = await ticks(planner(fleet, engine, dry_run=True), fleet, 6)
    assert decision.action == "dry-run"
    assert "aggregated 1 -> " in decision.result
    assert fleet.desired == 1


@pytest.mark.parametrize(("error", "action"), [(ScaleRefused("no room"), "refused"), (ConnectorUnavailable("gone"), "unavailable")])
async def test_a_write_that_fails_is_part_of_the_decision_and_tried_again(engine, error, action):
    fleet = Fleet(rate=200.0, broken=error)
    planning = planner(fleet, engine, stuck_after=3)
    decision = await ticks(planning, fleet, 8)
    assert decision.action == action
    assert str(error) in decision.result
    assert any(f"were {action}" in what for what in decision.stuck)
    fleet.broken = None
    assert (await ticks(planning, fleet, 1)).action == "scaled"


async def test_the_cold_start_is_measured(engine):
    fleet = Fleet(rate=200.0, cold=95.0)
    planning = planner(fleet, engine, cold_start=10.0)
    await ticks(planning, fleet, 30)
    assert planning.mind.cold_start == pytest.approx(100.0, abs=15)


async def test_what_is_vetoed_again_and_again_is_called_stuck(engine):
    fleet = Fleet(rate=500.0)
    decision = await ticks(planner(fleet, engine, gpus=2, stuck_after=5), fleet, 20)
    assert fleet.desired == 2
    assert any("to scale aggregated up, vetoed by budget" in what for what in decision.stuck)
    assert "held back budget" in explain(decision)


async def test_replicas_that_do_not_come_are_called_stuck(engine):
    fleet = Fleet(rate=200.0, cold=1e9)
    decision = await ticks(planner(fleet, engine, stuck_after=3, cold_start=20.0), fleet, 30)
    assert any("replicas are desired and 1 are ready" in what for what in decision.stuck)


async def test_a_cluster_without_room_is_asked_again_only_after_a_while(engine, tmp_path: Path):
    fleet = Fleet(rate=200.0, room=2)
    first = planner(fleet, engine, retry=120.0, record=tmp_path / "d.jsonl")
    decision = await ticks(first, fleet, 12)
    assert fleet.desired == 2
    assert "never started" in decision.won("aggregated").why
    asked = [d for d in first.ring if d.action == "scaled" and d.targets["aggregated"] > 2]
    assert len(asked) == 1, "once, and not again and again"
    again = planner(fleet, engine, retry=120.0)
    again.mind.recall(read_journal(tmp_path / "d.jsonl"), fleet.at)
    await ticks(again, fleet, 3)
    assert fleet.desired == 2, "a planner that starts again knows it too"
    fleet.room = 100
    await ticks(again, fleet, 20)
    assert fleet.ready > 2


async def test_an_idle_fleet_goes_to_zero_and_a_held_request_wakes_it(engine):
    fleet = Fleet(rate=1.0)
    planning = planner(fleet, engine, idle=120.0)
    await ticks(planning, fleet, 6)
    fleet.rate = 0.0
    await ticks(planning, fleet, 30)
    assert fleet.desired == 0
    fleet.held = 1.0
    await ticks(planning, fleet, 1)
    assert fleet.desired == 1


async def test_a_human_who_scales_is_followed_and_not_fought_at_once(engine):
    fleet = Fleet()
    planning = planner(fleet, engine)
    await ticks(planning, fleet, 12)
    fleet.desired = 4
    decision = await ticks(planning, fleet, 1)
    assert decision.fleet["aggregated"].desired == 4
    assert fleet.desired in (3, 4)


async def test_decisions_are_kept_in_a_ring_and_a_file(engine, tmp_path: Path):
    journal = tmp_path / "sub" / "decisions.jsonl"
    fleet = Fleet(rate=100.0)
    planning = planner(fleet, engine, record=journal, decisions=5)
    await ticks(planning, fleet, 12)
    assert len(planning.ring) == 5
    assert planning.ring.find(3) is None
    kept = read_journal(journal)
    assert [d.number for d in kept] == list(range(1, 13))
    assert kept[-1] == planning.ring.find(12)
    with journal.open("a") as file:
        file.write('{"number": 13, "at"')
    assert len(read_journal(journal)) == 12, "a line that a crash has cut"
    again = Fleet(rate=100.0)
    await ticks(planner(again, engine, record=journal), again, 2)
    assert [d.number for d in read_journal(journal)] == [*range(1, 13), 1, 2]
    (tmp_path / "other").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="no line of it is a decision"):
        read_journal(tmp_path / "other")
    assert json.loads(journal.read_text().splitlines()[4])["proposals"]


async def test_a_planner_that_starts_again_goes_on_with_what_it_recorded(engine, tmp_path: Path):
    fleet = Fleet(rate=100.0)
    first = planner(fleet, engine, record=tmp_path / "d.jsonl")
    await ticks(first, fleet, 40)
    past, points = read_journal(tmp_path / "d.jsonl"), first.mind.history.points
    assert len(points) == 13
    soon, late = planner(Fleet(), engine).mind, planner(Fleet(), None).mind
    assert soon.recall(past, fleet.at + 60.0) == 13
    assert soon.history.points == points
    assert late.recall(past, fleet.at + 3600.0) == 0, "a season would be shifted by the gap"
    assert late.view(Observation(0.0, None, {})).performance is not None, "what the engines can do is remembered all the same"


async def test_a_full_journal_is_put_aside(engine, tmp_path: Path):
    journal = tmp_path / "d.jsonl"
    fleet = Fleet(rate=100.0)
    await ticks(planner(fleet, engine, record=journal, record_bytes=4096), fleet, 30)
    assert journal.with_name("d.jsonl.1").exists()
    assert journal.stat().st_size <= 4096
    assert read_journal(journal)[-1].number == 30


async def test_what_if_decides_for_twice_the_load_without_doing_anything(engine, tmp_path: Path):
    fleet = Fleet(rate=60.0)
    planning = planner(fleet, engine, record=tmp_path / "d.jsonl")
    await ticks(planning, fleet, 20)
    past, kept = read_journal(tmp_path / "d.jsonl"), fleet.desired

    def again(*words: str, **other):
        return what_if(planner(Fleet(), engine, patience=0.0, max_step=1000, **other).mind, past, changes(words))

    same, double, triple = again().targets["aggregated"], again("load=2x").targets["aggregated"], again("load=3x").targets["aggregated"]
    assert same <= double <= triple
    assert same < triple
    assert again("load=3x", gpus=2).targets["aggregated"] == 2
    assert again("prompt=4x").forecast.prompt_tokens[0] == pytest.approx(4000, rel=0.01)
    assert fleet.desired == kept
    with pytest.raises(ConfigError, match="load=2x"):
        changes(["load=lots"])
    with pytest.raises(ConfigError, match="no decision was recorded"):
        what_if(planning.mind, [], {})


async def test_the_report_is_one_page_that_needs_nothing_else(engine):
    fleet = Fleet(rate=100.0)
    planning = planner(fleet, engine)
    await ticks(planning, fleet, 20)
    html = page(list(planning.ring), "A <fleet>", ttft=0.5, itl=0.02)
    assert html.count("<svg") == 4
    assert "A &lt;fleet&gt;" in html
    assert "<script" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "aggregated 1 -&gt;" in html
    assert "No decision" in page([])


async def test_a_planner_that_reads_no_reports_plans_all_the_same(engine):
    fleet = Fleet(rate=200.0, reports_missing=5)
    planning = planner(fleet, engine, propose=(Use("sla"),))
    planning.workers = None
    await ticks(planning, fleet, 8)
    assert fleet.desired > 1


@pytest.mark.parametrize(("wrong", "said"), [
    ({"roles": ("aggregated", "decode")}, "roles"), ({"interval": 25.0}, "multiple of `tick`"), ({"minimum": {"decode": 1}}, "decode"),
    ({"minimum": {"aggregated": 4}, "maximum": {"aggregated": 2}}, "maximum of aggregated"), ({"minimum": {"aggregated": -1}}, "negative"),
])
def test_settings_that_contradict_each_other_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Planner(**{"metrics": Metrics(frontends=("http://x",)), "tick": 10.0, **wrong})
    with pytest.raises(ValueError, match="either"):
        Metrics()
