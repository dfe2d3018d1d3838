"""The connector `virtual`: the kit, with somebody else who acts on what is written, and real workers that he starts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from dynamo_core.config.schema import Use
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.ending import ended
from dynamo_core.errors import ConnectorUnavailable, DynamoError, ScaleRefused
from dynamo_core.testing.cluster import Cluster
from dynamo_planner.connectors.decisions import Decision, Decisions
from dynamo_planner.connectors.kit import ConnectorContract
from dynamo_planner.connectors.virtual import VirtualConnector


class Actor:
    """Keeps as many workers as the last decision says, in this process."""

    def __init__(self, cluster: Cluster, decisions: Decisions) -> None:
        self.cluster = cluster
        self.decisions = decisions
        self.workers: dict[str, list[int]] = {}
        self.wanted: dict[str, int] = {}
        self.broken: set[str] = set()
        self.refusal: str | None = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._heal())

    async def _read(self) -> None:
        async for decision in self.decisions.follow():
            if self.refusal:
                await self.decisions.refuse(decision, self.refusal)
            else:
                self.wanted = decision.targets
                await self.decisions.done(decision)

    async def _heal(self) -> None:
        while True:
            for role, count in self.wanted.items():
                mine = self.workers.setdefault(role, [])
                mine[:] = [number for number in mine if self.cluster.members[number] is not None]
                with contextlib.suppress(DynamoError):
                    while len(mine) > count:
                        await self.cluster.drain(mine.pop())
                    while len(mine) < count and role not in self.broken:
                        mine.append(await self.cluster.add(role=role, name=role))
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def acting(folder: Path) -> AsyncGenerator[Actor]:
    async with Cluster.up(workers=0, lease_ttl=1.0, discovery=Use("file", {"path": str(folder)})) as cluster, FileDiscovery(folder) as store:
        actor = Actor(cluster, Decisions(store, "dynamo"))
        running = asyncio.create_task(actor.run())
        try:
            yield actor
        finally:
            await ended(running)


@pytest.fixture
async def actor(tmp_path: Path) -> AsyncIterator[Actor]:
    async with acting(tmp_path / "discovery") as actor:
        yield actor


@pytest.fixture
async def connector(actor: Actor, tmp_path: Path) -> AsyncIterator[VirtualConnector]:
    connector = VirtualConnector(gpus={"prefill": 1, "decode": 2}, ready_timeout=3.0)
    await connector.follow(FileDiscovery(tmp_path / "discovery"), "dynamo")
    yield connector
    await connector.close()


class TestVirtual(ConnectorContract):
    poll = 0.02

    @pytest.fixture(autouse=True)
    def _with_actor(self, actor: Actor, tmp_path: Path) -> None:
        self.actor = actor
        self.folder = tmp_path / "discovery"

    async def kill(self, connector: VirtualConnector, role: str) -> bool:
        self.actor.broken.add(role)  # or the successor may be there before anybody looks
        await self.actor.cluster.kill(self.actor.workers[role][0])
        return True

    async def heal(self, connector: VirtualConnector, role: str) -> None:
        self.actor.broken.discard(role)

    async def spoil(self, connector: VirtualConnector, role: str) -> bool:
        self.actor.broken.add(role)
        return True

    @contextlib.asynccontextmanager
    async def outage(self, connector: VirtualConnector) -> AsyncIterator[None]:
        away = self.folder.rename(self.folder.with_name("away"))
        self.folder.write_text("a file where the directory should be")
        try:
            yield
        finally:
            self.folder.unlink()
            away.rename(self.folder)


async def test_before_the_first_decision_what_runs_is_what_is_desired(connector: VirtualConnector, actor: Actor) -> None:
    await actor.cluster.add(role="decode", name="decode")
    async with asyncio.timeout(20):
        while (state := (await connector.observe())["decode"]).ready != 1:
            await asyncio.sleep(0.02)
    assert (state.desired, state.stable, state.gpus_per_replica) == (1, True, 2)


async def test_a_decision_that_is_refused_is_taken_back(connector: VirtualConnector, actor: Actor) -> None:
    connector.answer_timeout = 20.0
    await connector.scale({"prefill": 1, "decode": 1}, reason="test")
    actor.refusal = "no quota left"
    with pytest.raises(ScaleRefused, match="no quota left"):
        await connector.scale({"prefill": 3}, reason="test")
    assert {role: state.desired for role, state in (await connector.observe()).items()} == {"prefill": 1, "decode": 1}


async def test_a_decision_that_is_refused_late_will_never_come(connector: VirtualConnector, actor: Actor) -> None:
    actor.refusal = "no quota left"
    await connector.scale({"prefill": 2}, reason="test")
    async with asyncio.timeout(20):
        while (await connector.observe())["prefill"].reducible != 2:
            await asyncio.sleep(0.02)


async def test_a_decision_that_nobody_takes_is_not_confirmed(tmp_path: Path) -> None:
    connector = VirtualConnector(gpus={"aggregated": 1}, answer_timeout=0.2)
    await connector.follow(FileDiscovery(tmp_path), "dynamo")
    with pytest.raises(ConnectorUnavailable, match=r"nobody took decision 1 within 0\.2 s"):
        await connector.scale({"aggregated": 1}, reason="test")
    await connector.close()


async def test_of_two_planners_that_write_at_once_the_one_that_lost_is_told(tmp_path: Path) -> None:
    connector = VirtualConnector(gpus={"aggregated": 1})
    store = FileDiscovery(tmp_path)
    await connector.follow(store, "dynamo")
    other = Decisions(store, "dynamo")
    decide = connector._decisions.decide

    async def overtaken(decision: Decision) -> None:
        await decide(decision)
        await other.decide(Decision(id=decision.id, targets={"aggregated": 7}, reason="another planner"))

    connector._decisions.decide = overtaken
    with pytest.raises(ScaleRefused, match="another planner"):
        await connector.scale({"aggregated": 1}, reason="test")
    assert (await connector.observe())["aggregated"].desired == 7
    await connector.close()


async def test_the_last_decision_stays_when_the_planner_ends_and_the_next_one_counts_on(tmp_path: Path) -> None:
    for count in (1, 2, 3):
        connector = VirtualConnector(gpus={"aggregated": 1})
        await connector.follow(FileDiscovery(tmp_path), "dynamo")
        assert (await connector.observe())["aggregated"].desired == count - 1
        await connector.scale({"aggregated": count}, reason="test")
        await connector.close()
    async with FileDiscovery(tmp_path) as store:
        last = await Decisions(store, "dynamo").last()
        assert last is not None
        assert (last.id, last.targets) == (3, {"aggregated": 3})


async def test_a_connector_can_be_closed_while_the_store_is_away(tmp_path: Path) -> None:
    folder = tmp_path / "discovery"
    connector = VirtualConnector(gpus={"aggregated": 1}, models=("echo",))
    await connector.follow(FileDiscovery(folder), "dynamo")
    folder.rename(tmp_path / "away")
    folder.write_text("a file where the directory should be")
    await connector.close()
    with pytest.raises(ConnectorUnavailable):
        await connector.observe()
