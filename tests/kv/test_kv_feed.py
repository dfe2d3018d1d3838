"""The feed of KV events, against a publisher that speaks as vLLM's does and loses what it is told to lose."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_core.ending import ended
from dynamo_core.engines import BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.kv.feed import KvFeed


def stored(*hashes: int, parent: int | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent, "token_ids": list(range(4 * len(hashes))), "block_size": 4,
            "lora_id": None, "medium": "GPU", "lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention", **more}  # fmt: skip


class Publisher:
    """vLLM's publisher: PUB with numbered batches, ROUTER with the last ones."""

    def __init__(self, endpoints: tuple[str, str], keep: int = 1000) -> None:
        self.context = zmq.asyncio.Context()
        self.pub, self.router = self.context.socket(zmq.PUB), self.context.socket(zmq.ROUTER)
        self.pub.bind(endpoints[0])
        self.router.bind(endpoints[1])
        self.next, self.keep = 0, keep
        self.kept: list[tuple[int, bytes]] = []
        self.replays = 0
        self.task = asyncio.create_task(self._serve())

    async def publish(self, *events: dict[str, Any], lose: bool = False) -> None:
        payload = msgspec.msgpack.encode((1.0, events, 0))
        self.kept = [*self.kept, (self.next, payload)][-self.keep :]
        if not lose:
            await self.pub.send_multipart([b"", self.next.to_bytes(8, "big"), payload])
        self.next += 1

    async def _serve(self) -> None:
        while True:
            client, _, start = await self.router.recv_multipart()
            self.replays += 1
            for number, payload in self.kept:
                if number >= int.from_bytes(start, "big"):
                    await self.router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            await self.router.send_multipart([client, b"", b"", (-1).to_bytes(8, "big", signed=True), b""])

    async def close(self) -> None:
        """The next publisher at these endpoints starts from 0, as a server does that is started again."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.context.destroy(linger=0)


class Heard(list[KvEvent]):
    def hear(self, events: Sequence[KvEvent], rank: int) -> None:
        self.extend(events)

    async def count(self, n: int) -> list[KvEvent]:
        async with asyncio.timeout(20):
            while len(self) < n:
                await asyncio.sleep(0.01)
        return list(self)


def line_of(folder: Path) -> tuple[str, str]:
    return f"ipc://{folder}/events", f"ipc://{folder}/replay"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


class Way:
    """Stands between a feed and its publisher, both at sockets of the file system, and can be cut."""

    def __init__(self, front: str, behind: str) -> None:
        self._front, self._behind = front.removeprefix("ipc://"), behind.removeprefix("ipc://")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, front: str, behind: str) -> Way:
        way = cls(front, behind)
        await way.restore()
        return way

    async def restore(self) -> None:
        Path(self._front).unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._joined, self._front)

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._behind)
        self._writers |= {writer, back}
        for source, sink in ((reader, back), (there, writer)):
            self._tasks.add(asyncio.create_task(self._copy(source, sink)))

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        Path(self._front).unlink(missing_ok=True)
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        await self.cut()
        await ended(*self._tasks)


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[tuple[Publisher, KvFeed, Heard]]:
    endpoints, heard = line_of(tmp_path), Heard()
    feed = KvFeed(0, endpoints, heard.hear)
    publisher = Publisher(endpoints, keep=3)
    yield publisher, feed, heard
    await feed.close()
    await publisher.close()


def hashes(events: Sequence[KvEvent]) -> list[Any]:
    return [list(event.hashes) if isinstance(event, BlocksStored | BlocksRemoved) else "cleared" for event in events]


async def test_what_was_published_before_the_feed_opened_is_not_missed(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await publisher.publish(stored(1), lose=True)
    await publisher.publish(stored(2, parent=1), lose=True)
    await feed.open()
    await publisher.publish({"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "group_idx": 0})
    assert hashes(await heard.count(3)) == [[1], [2], [2]]


async def test_a_lost_batch_is_asked_for_again_and_nothing_comes_twice(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await heard.count(1)
    await publisher.publish(stored(2, parent=1), lose=True)
    await publisher.publish(stored(3, parent=2))
    await publisher.publish(stored(4, parent=3))
    assert hashes(await heard.count(4)) == [[1], [2], [3], [4]]
    assert publisher.replays >= 2, "one at the start, one for the gap"
    assert hashes(heard) == [[1], [2], [3], [4]]


async def test_a_lost_batch_that_nothing_follows_is_found_as_well(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await heard.count(1)
    await publisher.publish(stored(2, parent=1))
    await publisher.publish(stored(3, parent=2), lose=True)
    assert hashes(await heard.count(3)) == [[1], [2], [3]]


async def test_what_the_replay_no_longer_has_empties_the_cache_for_its_readers(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await heard.count(1)
    for block in range(2, 8):
        await publisher.publish(stored(block), lose=True)
    await publisher.publish(stored(8))
    assert hashes(await heard.count(5)) == [[1], "cleared", [6], [7], [8]]


async def test_a_batch_that_is_not_understood_empties_the_cache_and_the_next_is_read(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish({"type": "BlockStored", "nonsense": True})
    await publisher.publish(stored(1))
    assert hashes(await heard.count(2)) == ["cleared", [1]]


async def test_an_engine_that_was_started_again_begins_with_an_empty_cache(line: tuple[Publisher, KvFeed, Heard], tmp_path: Path) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await publisher.publish(stored(2))
    await heard.count(2)
    await publisher.close()
    again = Publisher(line_of(tmp_path))
    try:
        await again.publish(stored(11), lose=True)
        await again.publish(stored(12), lose=True)
        await again.publish(stored(13), lose=True)
        await again.publish(stored(14))
        assert hashes(await heard.count(7)) == [[1], [2], "cleared", [11], [12], [13], [14]]
    finally:
        await again.close()


async def test_a_connection_that_was_cut_costs_nothing_when_the_engine_is_the_same(tmp_path: Path) -> None:
    endpoints, heard = line_of(tmp_path), Heard()
    behind = (f"ipc://{tmp_path}/events behind", endpoints[1])
    publisher, feed = Publisher(behind), KvFeed(0, endpoints, heard.hear)
    way = await Way.open(endpoints[0], behind[0])
    try:
        await feed.open()
        await publisher.publish(stored(1))
        await heard.count(1)
        await way.cut()
        await until(lambda: "nobody publishes" in feed.problem())
        await publisher.publish(stored(2))
        await way.restore()
        await until(lambda: not feed.problem())
        await publisher.publish(stored(3))
        assert hashes(await heard.count(3)) == [[1], [2], [3]]
    finally:
        await feed.close()
        await way.close()
        await publisher.close()


async def test_without_a_replay_every_loss_empties_the_cache(tmp_path: Path) -> None:
    endpoints, heard = line_of(tmp_path), Heard()
    publisher, feed = Publisher(endpoints), KvFeed(0, (endpoints[0], None), heard.hear)
    try:
        await feed.open()
        await until(lambda: not feed.problem())
        while not heard:  # until our subscription has arrived
            await publisher.publish(stored(1))
            await asyncio.sleep(0.01)
        heard.clear()
        await publisher.publish(stored(2), lose=True)
        await publisher.publish(stored(3))
        assert hashes(await heard.count(2))[-2:] == ["cleared", [3]]
        publisher.next = 0
        await publisher.publish(stored(4))
        assert hashes(await heard.count(4))[-2:] == ["cleared", [4]]
    finally:
        await feed.close()
        await publisher.close()


async def test_a_long_replay_lets_the_event_loop_go_on(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    publisher.keep = 5000
    for block in range(500):
        await publisher.publish(stored(block), lose=True)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    await feed.open()
    counting.cancel()
    assert len(await heard.count(500)) == 500
    assert turns >= 500 // 32


async def test_what_is_no_batch_is_left_out(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await heard.count(1)
    await publisher.pub.send_multipart([b"", b"nonsense"])
    await publisher.publish(stored(2))
    assert hashes(await heard.count(2)) == [[1], [2]]


async def test_another_kind_of_publisher_is_named_and_stops_nothing(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish(stored(1))
    await heard.count(1)
    await publisher.pub.send_multipart([b"kv\0", (2**100).to_bytes(16, "big"), b"an event of the zmq plane"])
    await until(lambda: "something else than KV events" in feed.problem())
    await publisher.publish(stored(2), lose=True)
    await publisher.publish(stored(3))
    assert hashes(await heard.count(3)) == [[1], [2], [3]]
    assert feed.problem() == ""


async def test_batches_that_nobody_understands_are_named(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    await publisher.publish({"type": "BlockStored", "block_hashes": "none"})
    await until(lambda: "batch 0 is not understood" in feed.problem())
    await publisher.publish(stored(2))
    await until(lambda: [2] in hashes(heard))
    assert feed.problem() == ""


async def test_a_batch_that_is_nested_without_end_stops_nothing(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open()
    batch = b"\x93\xcb" + bytes(8) + b"\x91\x82\xa4type\xa7Another\xa1x" + b"\x91" * 100_000 + b"\xc0\x00"
    publisher.kept, publisher.next = [(0, batch)], 1
    await publisher.pub.send_multipart([b"", bytes(8), batch])
    await until(lambda: "batch 0 is not understood" in feed.problem())
    await publisher.publish(stored(2))
    await until(lambda: [2] in hashes(heard))


@pytest.mark.parametrize("answer", [[b"hello"], [b"", b"", b"5", b"batch"], [b"", b"", b"\xff" * 20, b"batch"]])
async def test_what_answers_in_place_of_a_replay_is_named_and_the_feed_goes_on_without(tmp_path: Path, answer: list[bytes]) -> None:
    endpoints, heard = line_of(tmp_path), Heard()
    feed, context = KvFeed(0, endpoints, heard.hear), zmq.asyncio.Context()
    pub, router = context.socket(zmq.PUB), context.socket(zmq.ROUTER)
    pub.bind(endpoints[0])
    router.bind(endpoints[1])

    async def serve() -> None:
        while True:
            client, *_ = await router.recv_multipart()
            await router.send_multipart([client, *answer])

    serving = asyncio.create_task(serve())
    try:
        await feed.open()
        await until(lambda: "does not replay" in feed.problem())
        await pub.send_multipart([b"", bytes(8), msgspec.msgpack.encode((1.0, [stored(1)], 0))])
        await until(lambda: [1] in hashes(heard))
    finally:
        await ended(serving)
        await feed.close()
        context.destroy(linger=0)
