"""Stacks that change while requests run, that decide along, and whose decisions are written down and decided again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import attrs
import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.cli.commands import run
from dynamo_core.config.schema import Router, Use
from dynamo_core.errors import ConfigError
from dynamo_core.pipeline.stacks import Stacks
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.record import Decision
from dynamo_core.routing.ring import Ring
from dynamo_core.routing.sources import Unobserved
from dynamo_core.routing.stack import build_stack
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Instance


async def ask(cluster: Cluster, count: int) -> None:
    for i in range(count):
        await read_all(await cluster.generate(f"hello {i}", max_tokens=4))


async def test_a_reload_changes_the_stack_of_requests_to_come_and_every_record_says_its_generation():
    async with Cluster.up(workers=2, engine="echo", router=Router(use=Use("round-robin"))) as cluster:
        await ask(cluster, 2)
        done = cluster.catalog.stacks.reload(attrs.evolve(cluster.config, router=Router(use=Use("least-loaded"), decisions=7, seed=0), lease_ttl=9.0), cluster.config)
        assert (done.generation, done.changed, done.needs_restart) == (2, True, ("router.decisions", "lease_ttl"))
        await ask(cluster, 2)
        assert [d.generation for d in cluster.catalog._ring] == [1, 1, 2, 2]
        assert not cluster.catalog.stacks.reload(cluster.config, attrs.evolve(cluster.config)).needs_restart


async def test_a_configuration_that_cannot_be_used_changes_nothing():
    async with Cluster.up(workers=1, engine="echo", router=Router(use=Use("round-robin"))) as cluster:
        for bad in (Router(use=Use("nobody")), Router(use=Use("round-robin"), prefill=Router(scorers=(Use("nope"),)))):
            with pytest.raises(ConfigError):
                cluster.catalog.stacks.reload(attrs.evolve(cluster.config, router=bad), cluster.config)
        await ask(cluster, 1)
        assert [d.generation for d in cluster.catalog._ring] == [1]


async def test_bookings_survive_a_reload():
    async with Cluster.up(workers=2, engine="echo", options={"delay": 0.2}, router=Router(use=Use("least-loaded"))) as cluster:
        running = await cluster.generate("hello", max_tokens=4)
        cluster.catalog.stacks.reload(attrs.evolve(cluster.config, router=Router(scorers=(Use("load"),))), cluster.config)
        second = await cluster.generate("hello", max_tokens=4)
        assert running.workers != second.workers
        await read_all(running)
        await read_all(second)


async def test_a_shadow_stack_is_compared_and_changes_nothing():
    async with Cluster.up(workers=3, engine="echo", router=Router(use=Use("round-robin"), shadow=Router(use=Use("random")))) as cluster:
        def compared() -> float:
            labels = {"model": cluster.model.name}
            return sum(cluster.registry.get_sample_value("dynamo_router_shadow_decisions_total", labels | {"verdict": v}) or 0 for v in ("same", "other"))

        await ask(cluster, 12)
        async with asyncio.timeout(20):
            while compared() < 12:
                await asyncio.sleep(0.01)
        status = next(iter(cluster.catalog.stacks.status()["shadows"].values()))  # type: ignore[union-attr, attr-defined]
        assert (status["seen"], status["same"] + status["other"], compared()) == (12, 12, 12)
        assert {d.stack for d in cluster.catalog._ring} == {build_stack(Router(use=Use("round-robin")), Plugins.load()).hash}


async def test_recorded_decisions_are_decided_again_by_another_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "decisions.jsonl"
    async with Cluster.up(workers=3, engine="echo", router=Router(use=Use("round-robin"), record=path)) as cluster:
        await ask(cluster, 9)
    lines = path.read_text().splitlines()
    assert len(lines) == 9
    decisions = [Decision.from_json(line) for line in lines]
    assert {d.outcome for d in decisions} == {"done"}
    assert all("hello" not in line for line in lines)
    same, other = tmp_path / "same.toml", tmp_path / "other.toml"
    same.write_text('[router]\nuse = "round-robin"\n')
    other.write_text('[router]\nfilters = [{ use = "pinned", required = true }]\n')
    command = Plugins.load().of_kind("cli")["replay"]
    assert run(command, [str(path), "--stack", str(same), "--max-changed", "0%"]) == 0
    assert "9 decisions: 9 stay, 0 change" in capsys.readouterr().out
    assert run(command, [str(path), "--stack", str(other), "--max-changed", "5%"]) == 1
    assert "9 change (100.0%), of which 9 find nobody" in capsys.readouterr().out


async def test_the_record_file_is_bounded(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    async with Cluster.up(workers=2, engine="echo", router=Router(use=Use("round-robin"), record=path, record_bytes=4096)) as cluster:
        await asyncio.gather(*(ask(cluster, 5) for _ in range(10)))
    files = sorted(tmp_path.iterdir())
    assert {f.name for f in files} <= {"d.jsonl", "d.jsonl.1"}
    assert all(f.stat().st_size < 4096 + 4000 for f in files)


async def test_decisions_that_cannot_be_recorded_are_a_named_problem(tmp_path: Path):
    (tmp_path / "file").write_text("")
    async with Cluster.up(workers=2, engine="echo", router=Router(use=Use("round-robin"), record=tmp_path / "file" / "d.jsonl")) as cluster:
        await ask(cluster, 1)
        async with asyncio.timeout(20):
            while not cluster.catalog.problems():
                await asyncio.sleep(0.05)
        assert "cannot be recorded" in cluster.catalog.problems()["decision records"]


async def test_a_shadow_that_was_stopped_is_a_named_problem():
    router = Router(use=Use("round-robin"), shadow=Router(use=Use("random")), shadow_budget=1e-9)
    async with Cluster.up(workers=2, engine="echo", router=router) as cluster:
        async with asyncio.timeout(20):
            while not cluster.catalog.problems():
                await ask(cluster, 4)
        ((name, why),) = cluster.catalog.problems().items()
        assert name == f"shadow stack of {cluster.model.name}/aggregated"
        assert why


def test_frontend_processes_of_one_file_do_not_all_break_their_ties_for_the_same_worker(monkeypatch: pytest.MonkeyPatch):
    def choices(pid: int, *, alone: bool, seed: int | None = 7) -> list[int]:
        monkeypatch.setattr("os.getpid", lambda: pid)
        config = Router(use=Use("random"), seed=seed)
        router = Stacks(config, Plugins.load(), Ring(1), alone=alone).router("m", "aggregated", None, lambda _: None)  # type: ignore[arg-type]
        router.observer = Unobserved()
        for i in range(8):
            router.joined(Worker(i), Instance(id=i, namespace="n", component="c", endpoint="e", address="a"), ModelCard(name="m"))
            router.proven(Worker(i))
        return [router.route(RoutingRequest(f"{n}", "m")).worker.instance for n in range(30)]  # type: ignore[union-attr]

    assert choices(1, alone=True) == choices(2, alone=True)
    assert choices(1, alone=False) != choices(2, alone=False)
    assert choices(1, alone=True, seed=None) != choices(1, alone=True, seed=None), "frontends of one fleet, each on a machine of its own"
