"""How the nodes of one engine find each other and see each other go, over real connections and without vLLM."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import attrs
import pytest

from dynamo_core.errors import ConfigError, EngineFailed
from dynamo_vllm.nodes import Head, OtherNodes, Place


@attrs.define(eq=False)
class Heard:
    place: Place
    lost: list[str] = attrs.field(factory=list[str])
    leaving: list[str] = attrs.field(factory=list[str])
    others: OtherNodes | None = None

    async def open(self) -> OtherNodes:
        self.others = OtherNodes(self.place, "0.32.0", self.lost.append, self.leaving.append)
        await self.others.open()
        return self.others


@pytest.fixture
async def heard() -> AsyncIterator[Heard]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = Heard(Place("127.0.0.1", port, (0, 1), 4, 0))
    yield found
    if found.others is not None:
        await found.others.close()


def place(heard: Heard, *ranks: int, node: int = 0) -> Place:
    return attrs.evolve(heard.place, ranks=ranks, node=node)


async def until(what: list[str]) -> str:
    async with asyncio.timeout(20):
        while not what:
            await asyncio.sleep(0.01)
    return what[0]


async def test_a_node_waits_for_the_head_and_then_for_the_whole_engine(heard: Heard) -> None:
    finding = asyncio.create_task(Head.find(place(heard, 2, 3), "0.32.0"))
    await asyncio.sleep(0.05)
    others = await heard.open()
    async with asyncio.timeout(20):
        head = await finding
        ready = asyncio.create_task(head.ready())
        await asyncio.sleep(0.05)
        assert not ready.done()
        others.ready()
        await ready
    head.close()
    assert "rank 2, 3" in await until(heard.lost)


async def test_each_side_sees_the_other_go(heard: Heard) -> None:
    others = await heard.open()
    async with asyncio.timeout(20):
        first, second = await Head.find(place(heard, 2), "0.32.0"), await Head.find(place(heard, 3), "0.32.0")
        first.leave()
        assert "(rank 2) is leaving" in await until(heard.leaving)
        first.close()
        assert "(rank 2) of this engine is gone" in await until(heard.lost)
        await others.close()
        await second.gone()
        with pytest.raises(EngineFailed, match="is gone"):
            await second.ready()
    second.close()
    assert len(heard.lost) == 1, "a head that leaves has lost nobody"


async def test_a_node_that_does_not_fit_is_refused_with_the_reason(heard: Heard) -> None:
    await heard.open()
    async with asyncio.timeout(20):
        with pytest.raises(ConfigError, match=r"the head runs vLLM 0\.32\.0 and this node 0\.33\.1"):
            await Head.find(place(heard, 2), "0.33.1")
        for ranks in ((1,), (3, 4)):
            with pytest.raises(ConfigError, match="the engine has 4 ranks"):
                await Head.find(place(heard, *ranks), "0.32.0")
    assert heard.lost == []


@pytest.mark.parametrize(("first", "second"), [((2,), (2, 3)), ((), ())])
async def test_who_comes_in_place_of_a_node_that_is_still_there_waits(heard: Heard, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    others = await heard.open()
    async with asyncio.timeout(20):
        head = await Head.find(place(heard, *first, node=1), "0.32.0")
        others.ready()
        waiting = asyncio.create_task(Head.find(place(heard, *second, node=1), "0.32.0"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await others.close()  # the next engine takes it
        await heard.open()
        (await waiting).close()
    head.close()


async def test_strangers_are_sent_away_and_mean_nothing(heard: Heard) -> None:
    await heard.open()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f", b"x" * 200_000, b'{"host": "h"}\n'):
        reader, writer = await asyncio.open_connection(heard.place.host, heard.place.port)
        writer.write(words)
        writer.write_eof()
        async with asyncio.timeout(20):
            try:
                assert await reader.read() == b""
            except ConnectionError:
                pass
        writer.close()
    assert heard.lost == []


async def test_an_address_that_is_taken_is_the_operators_mistake(heard: Heard) -> None:
    with socket.create_server((heard.place.host, heard.place.port)):
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{heard.place.port}"):
            await heard.open()
        heard.others = None
