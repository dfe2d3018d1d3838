from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.engines.contract import BlocksRemoved, BlocksStored
from dynamo_core.kv import News
from dynamo_core.kv.wire import Ask, decode_news, encode
from dynamo_core.runtime import relay as module
from dynamo_core.runtime.relay import KvRelay

CARD = ModelCard(name="m", block_size=4, dp_size=2, kv_events=True)


class Router:
    """Hears what is published, and asks."""

    def __init__(self) -> None:
        self.heard: list[News] = []
        self.relay = KvRelay(CARD, b"s", lambda payload: self.heard.append(decode_news(payload)))

    async def ask(self, after: int, rank: int = 0, stream: int | None = None) -> list[News]:
        question = encode(Ask(self.relay._stream if stream is None else stream, rank, after))  # pyright: ignore[reportPrivateUsage]
        return [decode_news(item) async for item in self.relay.answer(question, None)]  # type: ignore[arg-type]

    def news(self, rank: int = 0) -> list[int]:
        return [news.id for news in self.heard if news.changes and news.dp_rank == rank]


@pytest.fixture
async def router() -> AsyncGenerator[Router]:
    router = Router()
    yield router
    router.relay.close()


def block(number: int) -> BlocksStored:
    return BlocksStored([number], None, [number] * 4)


async def test_what_is_reported_together_travels_as_one_change(router: Router):
    for number in range(10):
        router.relay.reported([block(number)], 0)
    await asyncio.sleep(5 * module.BATCH)
    (news,) = router.heard
    assert (news.id, len(news.changes), len(news.changes[0][2])) == (1, 1, 80)


async def test_ranks_are_numbered_apart_and_an_unknown_rank_is_left_out(router: Router):
    for rank in (0, 1, 1, 7):
        router.relay.reported([block(1)], rank)
        await router.ask(0)
        router.relay.reported([block(2)], rank)
        await router.ask(0)
    assert (router.news(0), router.news(1), router.news(7)) == ([1, 2], [1, 2], [])


async def test_what_was_missed_is_sent_again_and_too_much_of_it_is_a_whole_picture(router: Router, monkeypatch: pytest.MonkeyPatch):
    for number in range(1, 21):
        router.relay.reported([block(number)], 0)
        await router.ask(0)
    assert [news.id for news in await router.ask(17)] == [18, 19, 20]
    assert not any(news.whole for news in await router.ask(17))
    monkeypatch.setattr(module, "KEEP_BYTES", 100)
    router.relay.reported([BlocksRemoved([1])], 0)
    (whole,) = await router.ask(17)
    assert (whole.whole, whole.id, len(whole.changes[0][2])) == (True, 21, 8 * 19)
    assert (await router.ask(20, stream=1))[0].whole


async def test_a_large_picture_comes_in_parts_and_an_empty_one_comes_too(router: Router, monkeypatch: pytest.MonkeyPatch):
    assert [(news.whole, news.changes) for news in await router.ask(0)] == [(True, [])]
    monkeypatch.setattr(module, "CHUNK", 3)
    router.relay.reported([block(number) for number in range(10)], 0)
    parts = await router.ask(0)
    assert [len(news.changes[0][2]) // 8 for news in parts] == [3, 3, 3, 1]
    assert {(news.whole, news.id) for news in parts} == {(True, 1)}


async def test_every_rank_shows_signs_of_life_with_its_last_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PULSE", 0.01)
    router = Router()
    router.relay.reported([block(1)], 1)
    async with asyncio.timeout(10):
        while {(news.dp_rank, news.id) for news in router.heard if not news.changes} < {(0, 0), (1, 1)}:
            await asyncio.sleep(0.01)
    router.relay.close()


async def test_an_engine_that_lies_about_its_blocks_is_a_problem_that_travels(router: Router):
    router.relay.reported([BlocksStored([1], None, [1] * 32)], 1)
    assert "32 tokens in 1 blocks" in router.relay.problems()["kv rank 1"]
    (news,) = await router.ask(0, rank=1)
    assert "32 tokens in 1 blocks" in news.problem
    assert (await router.ask(0, rank=0))[0].problem == ""


async def test_an_engine_is_silent_only_after_prompts_that_fill_a_block(router: Router):
    for _ in range(50):
        router.relay.prompted(3)
    assert not router.relay.problems()
    for _ in range(module.SILENT_PROMPTS):
        router.relay.prompted(4)
    assert len(router.relay.problems()) == 2
    router.relay.reported([block(1)], 0)
    assert not router.relay.problems()
