"""Where simulated workers meet: whoever comes first waits, and nobody waits for somebody who has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dynamo_core.errors import PeerLost
from dynamo_sim.rendezvous import Desk, blocks_of


@pytest.fixture
async def desk() -> AsyncIterator[tuple[Desk, str, int]]:
    desk = Desk()
    place = await desk.open("127.0.0.1")
    yield desk, str(place["host"]), int(place["port"])
    await desk.close()


async def fetch(host: str, port: int, number: int) -> None:
    async with blocks_of(host, port, number):
        pass


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_whoever_comes_first_waits_for_the_other(desk: tuple[Desk, str, int], first: str) -> None:
    server, host, port = desk
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        sides = [lambda: server.taken(7), lambda: fetch(host, port, 7)]
        for side in sides if first == "prefill" else reversed(sides):
            group.create_task(side())
            await asyncio.sleep(0.05)


async def test_decode_is_turned_away_when_prefill_gives_up(desk: tuple[Desk, str, int]) -> None:
    server, host, port = desk
    waiting = asyncio.create_task(fetch(host, port, 7))
    await asyncio.sleep(0.05)
    server.leave(7)
    with pytest.raises(PeerLost, match="has no blocks for this request"):
        await waiting


async def test_prefill_learns_that_decode_left_in_the_middle(desk: tuple[Desk, str, int]) -> None:
    server, host, port = desk
    async with asyncio.timeout(20):
        prefill = asyncio.create_task(server.taken(7))
        with pytest.raises(ZeroDivisionError):
            async with blocks_of(host, port, 7):
                raise ZeroDivisionError
        with pytest.raises(PeerLost, match="left before it had the blocks"):
            await prefill


async def test_a_desk_that_has_closed_is_a_lost_peer(desk: tuple[Desk, str, int]) -> None:
    server, host, port = desk
    await server.close()
    with pytest.raises(PeerLost, match="does not answer"):
        await fetch(host, port, 7)


async def test_strangers_disturb_nobody(desk: tuple[Desk, str, int]) -> None:
    server, host, port = desk
    for nonsense in (b"hello\n", b"\n", b"9" * 100_000 + b"\n", b""):
        _, writer = await asyncio.open_connection(host, port)
        writer.write(nonsense)
        writer.close()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(server.taken(7))
        group.create_task(fetch(host, port, 7))
