"""The feed of KV events, against a publisher that speaks as vLLM's does and loses what it is told to lose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from dynamo_core.engines import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_vllm.kv_feed import KvFeed, Translator
from dynamo_vllm.vllm_api import kv_endpoints


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


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[tuple[Publisher, KvFeed, Heard]]:
    endpoints, heard = kv_endpoints(tmp_path, 0), Heard()
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
    await feed.open(4)
    await publisher.publish({"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU", "group_idx": 0})
    assert hashes(await heard.count(3)) == [[1], [2], [2]]


async def test_a_lost_batch_is_asked_for_again_and_nothing_comes_twice(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open(4)
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
    await feed.open(4)
    await publisher.publish(stored(1))
    await heard.count(1)
    await publisher.publish(stored(2, parent=1))
    await publisher.publish(stored(3, parent=2), lose=True)
    assert hashes(await heard.count(3)) == [[1], [2], [3]]


async def test_what_the_replay_no_longer_has_empties_the_cache_for_its_readers(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open(4)
    await publisher.publish(stored(1))
    await heard.count(1)
    for block in range(2, 8):
        await publisher.publish(stored(block), lose=True)
    await publisher.publish(stored(8))
    assert hashes(await heard.count(5)) == [[1], "cleared", [6], [7], [8]]


async def test_a_batch_that_is_not_understood_empties_the_cache_and_the_next_is_read(line: tuple[Publisher, KvFeed, Heard]) -> None:
    publisher, feed, heard = line
    await feed.open(4)
    await publisher.publish({"type": "BlockStored", "nonsense": True})
    await publisher.publish(stored(1))
    assert hashes(await heard.count(2)) == ["cleared", [1]]


# ------------------------------------------------------------------ what events mean


def test_a_salt_is_known_for_every_block_below_the_first() -> None:
    events = Translator(4).translate([stored(1, 2, extra_keys=[["tenant"], None]), stored(3, parent=2), stored(9)])
    assert [event.cache_salt for event in events if isinstance(event, BlocksStored)] == ["tenant", "tenant", None]


def test_an_adapter_is_named_and_is_not_taken_for_a_salt() -> None:
    translator = Translator(4)
    (one,) = translator.translate([stored(1, lora_name="sql", extra_keys=[["sql"]])])
    (two,) = translator.translate([stored(2, lora_name="sql", extra_keys=[["sql", "tenant"]])])
    assert isinstance(one, BlocksStored)
    assert isinstance(two, BlocksStored)
    assert (one.adapter, one.cache_salt, two.adapter, two.cache_salt) == ("sql", None, "sql", "tenant")


def test_blocks_of_sliding_windows_say_nothing_about_prefixes_and_are_left_out() -> None:
    events = Translator(4).translate([
        stored(1), stored(7, group_idx=1, kv_cache_spec_kind="sliding_window"), {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU", "group_idx": 1},
        {"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU", "group_idx": 0}, {"type": "AllBlocksCleared"}, {"type": "SomethingNew"},
    ])  # fmt: skip
    assert hashes(events) == [[1], [1], "cleared"]
    assert isinstance(events[1], BlocksRemoved)
    assert events[1].tier == "host"
    assert isinstance(events[2], BlocksCleared)
