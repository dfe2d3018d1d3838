"""Planners that share a budget: the global planner behind a real socket, and connectors that ask it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import attrs
import httpx
import pytest

from dynamo_core.config import Secret, Tls
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.errors import ConfigError, ConnectorUnavailable, ScaleRefused
from dynamo_core.plugins import Plugins
from dynamo_core.scaling import RoleState
from dynamo_core.testing.servers import Authority
from dynamo_planner.connectors.shared import SharedConnector, _within
from dynamo_planner.connectors.virtual import VirtualConnector
from dynamo_planner.sharing.ledger import Member
from dynamo_planner.sharing.server import GlobalPlanner, serve_global

CHAT, BATCH = Secret("chat-" + "x" * 20), Secret("batch-" + "y" * 20)


@attrs.define
class Budget:
    url: str
    stop: Callable[[], None]

    async def connector(self, folder: Path, token: Secret, ca: Path | None = None) -> SharedConnector:
        connector = SharedConnector(url=self.url, token=token, every=0.05, ca=ca)
        inner = _Started(gpus={"aggregated": 1})
        inner.folder = folder
        await connector.over(inner)
        return connector

    async def state(self) -> dict[str, dict[str, int]]:
        async with httpx.AsyncClient(headers={"authorization": f"Bearer {CHAT}"}) as client:
            return (await client.get(f"{self.url}/v1/budget")).json()["planners"]


@attrs.define(eq=False)
class _Started(VirtualConnector):
    """Decisions in a folder of this test."""

    folder: Path = attrs.field(init=False)

    async def start(self) -> None:
        await self.follow(FileDiscovery(self.folder), "dynamo")


@contextlib.asynccontextmanager
async def budget(caplog: pytest.LogCaptureFixture, gpus: int = 4, *, lease: float = 0.5, patience: float = 60.0, tls: Tls | None = None) -> AsyncGenerator[Budget]:
    """A global planner that has learned who has what."""
    settings = GlobalPlanner(gpus=gpus, port=0, lease=lease, patience=patience, tls=tls, planners={"chat": Member(CHAT), "batch": Member(BATCH)})
    stop = asyncio.Event()
    caplog.set_level(logging.INFO, "dynamo.planner.global")
    caplog.clear()
    serving = asyncio.create_task(serve_global(settings, Plugins.load(), stop))
    async with asyncio.timeout(20):
        while not (found := re.search(r"listening on (\S+)", caplog.text)):
            assert not serving.done(), serving.result()
            await asyncio.sleep(0.01)
    await asyncio.sleep(lease)
    try:
        yield Budget(found[1], stop.set)
    finally:
        stop.set()
        await serving


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while True:
            found = condition()
            if await found if asyncio.iscoroutine(found) else found:  # type: ignore[misc]
                return
            await asyncio.sleep(0.02)


async def desired(connector: SharedConnector) -> dict[str, int]:
    return {role: state.desired for role, state in (await connector.observe()).items()}


async def _is(found, expected) -> bool:
    return await found == expected


async def _parked(it: Budget, name: str) -> int:
    return (await it.state())[name]["parked"]


async def test_what_does_not_fit_is_parked_and_carried_out_when_there_is_room(tmp_path, caplog) -> None:
    async with budget(caplog) as it:
        chat, batch = await it.connector(tmp_path / "chat", CHAT), await it.connector(tmp_path / "batch", BATCH)
        await chat.scale({"aggregated": 3}, reason="test")
        with pytest.raises(ScaleRefused, match=r"parked it: 2 GPUs do not fit: 0 are held and 1 could be had now"):
            await batch.scale({"aggregated": 2}, reason="test")
        assert await desired(batch) == {"aggregated": 0}
        assert (await it.state())["batch"]["parked"] == 2
        await chat.scale({"aggregated": 2}, reason="test")
        await until(lambda: _is(desired(batch), {"aggregated": 2}))
        await chat.close()
        await batch.close()


async def test_a_wish_that_was_parked_is_forgotten_when_another_one_follows(tmp_path, caplog) -> None:
    async with budget(caplog) as it:
        chat, batch = await it.connector(tmp_path / "chat", CHAT), await it.connector(tmp_path / "batch", BATCH)
        await chat.scale({"aggregated": 3}, reason="test")
        with pytest.raises(ScaleRefused):
            await batch.scale({"aggregated": 3}, reason="test")
        await batch.scale({"aggregated": 1}, reason="test")
        await chat.scale({"aggregated": 0}, reason="test")
        await until(lambda: _is(_parked(it, "batch"), 0))
        await asyncio.sleep(0.2)
        assert await desired(batch) == {"aggregated": 1}
        await chat.close()
        await batch.close()


async def test_a_planner_that_ends_gives_back_what_it_had_with_its_lease(tmp_path, caplog) -> None:
    async with budget(caplog) as it:
        chat, batch = await it.connector(tmp_path / "chat", CHAT), await it.connector(tmp_path / "batch", BATCH)
        await chat.scale({"aggregated": 4}, reason="test")
        with pytest.raises(ScaleRefused):
            await batch.scale({"aggregated": 4}, reason="test")
        await chat.close()
        await until(lambda: _is(desired(batch), {"aggregated": 4}))
        await until(lambda: "chat has not called for 0.5 s" in caplog.text)
        await batch.close()


async def test_who_has_more_than_his_share_goes_down_for_a_better_claim(tmp_path, caplog) -> None:
    async with budget(caplog, patience=0.3) as it:
        chat, batch = await it.connector(tmp_path / "chat", CHAT), await it.connector(tmp_path / "batch", BATCH)
        await batch.scale({"aggregated": 4}, reason="test")
        with pytest.raises(ScaleRefused):
            await chat.scale({"aggregated": 2}, reason="test")
        await until(lambda: _is(desired(chat), {"aggregated": 2}))
        assert await desired(batch) == {"aggregated": 2}
        await chat.close()
        await batch.close()


async def test_while_the_global_planner_is_away_fleets_may_shrink_and_not_grow(tmp_path, caplog) -> None:
    async with budget(caplog) as it:
        chat = await it.connector(tmp_path / "chat", CHAT)
        await chat.scale({"aggregated": 2}, reason="test")
    with pytest.raises(ConnectorUnavailable, match="does not answer, so nothing may grow"):
        await chat.scale({"aggregated": 3}, reason="test")
    await chat.scale({"aggregated": 1}, reason="test")
    assert await desired(chat) == {"aggregated": 1}
    await chat.close()


async def test_a_caller_is_who_its_token_says_and_nobody_else(tmp_path, caplog) -> None:
    async with budget(caplog) as it:
        stranger = await it.connector(tmp_path / "stranger", Secret("stranger-" + "z" * 20))
        with pytest.raises(ScaleRefused, match="its token is that of nobody"):
            await stranger.scale({"aggregated": 1}, reason="test")
        await stranger.close()
        async with httpx.AsyncClient(base_url=it.url) as client:
            ask = {"wanted": 1, "in_use": 0}
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Bearer {CHAT}x"}, {"authorization": f"bearer {CHAT}"}, {"authorization": CHAT}):
                assert (await client.post("/v1/ask", json=ask, headers=headers)).status_code == 401
                assert (await client.get("/v1/budget", headers=headers)).status_code == 401
            known = {"authorization": f"Bearer {CHAT}"}
            for body, status in ((b"{", 400), (b'{"wanted": -1, "in_use": 0}', 400), (b'{"wanted": 1, "in_use": 0, "planner": "batch"}', 400), (b" " * 20_000, 413)):
                assert (await client.post("/v1/ask", content=body, headers=known)).status_code == status
            assert (await client.post("/v1/ask", json=ask, headers=known)).json()["planner"] == "chat"
            text = (await client.get("/metrics")).text
            assert 'dynamo_global_planner_gpus{planner="chat",state="granted"} 1.0' in text
            assert str(CHAT) not in text + caplog.text


async def test_tokens_travel_encrypted_and_to_whom_the_planner_trusts(tmp_path, caplog) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("budget")
    async with budget(caplog, tls=Tls(cert, key)) as it:
        assert it.url.startswith("https://")
        trusting = await it.connector(tmp_path / "chat", CHAT, authority.cert)
        await trusting.scale({"aggregated": 1}, reason="test")
        assert await desired(trusting) == {"aggregated": 1}
        other = await it.connector(tmp_path / "batch", BATCH)
        with pytest.raises(ConnectorUnavailable, match="(?i)certificate"):
            await other.scale({"aggregated": 1}, reason="test")
        await trusting.close()
        await other.close()


async def test_certificates_that_cannot_be_read_are_the_operators_mistake(tmp_path: Path) -> None:
    connector = SharedConnector(url="https://127.0.0.1:1", token=CHAT, ca=tmp_path / "nothing.pem")
    with pytest.raises(ConfigError, match="cannot be read"):
        await connector.over(VirtualConnector(gpus={"aggregated": 1}))


def test_going_down_takes_from_who_uses_most_and_the_last_replica_last() -> None:
    seen = {role: RoleState(count, count, 0, 0, gpus, True) for role, count, gpus in (("prefill", 3, 1), ("decode", 2, 4))}
    assert _within(8, seen) == {"decode": 1}
    assert _within(5, seen) == {"decode": 1, "prefill": 1}
    assert _within(4, seen) == {"decode": 0, "prefill": 1}
    assert _within(0, seen) == {"decode": 0, "prefill": 0}


@pytest.mark.parametrize(("changes", "says"), [
    ({"planners": {"a": Member(Secret("short"))}}, "at least 16 characters"),
    ({"planners": {"a": Member(CHAT), "b": Member(CHAT)}}, "the same token"),
    ({"gpus": 1, "planners": {"a": Member(CHAT, minimum=2)}}, "the minimums are 2 GPUs together, and the budget is 1"),
])
def test_a_budget_that_cannot_be_kept_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GlobalPlanner(**{"gpus": 4, "planners": {"a": Member(CHAT)}} | changes)  # type: ignore[arg-type]
