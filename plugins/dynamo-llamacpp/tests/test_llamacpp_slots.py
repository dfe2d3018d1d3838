from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.contracts.engine_answers import replay_kv_events
from dynamo_core.engines import BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.errors import EngineDead
from dynamo_llamacpp.slots import Slots


def make(size: int = 2, block: int = 4) -> tuple[Slots, list[KvEvent]]:
    events: list[KvEvent] = []
    return Slots(size, block, 16, lambda: None, events.extend), events


async def run(slots: Slots, prompt: list[int], salt: str | None = None) -> int:
    slot = await slots.take(prompt, salt, 0)
    slots.give_back(slot, prompt)
    return slot.id


async def test_a_prompt_goes_to_the_slot_that_holds_most_of_it() -> None:
    slots, _ = make(3)
    first = await run(slots, [1] * 20)
    second = await run(slots, [1] * 10 + [2] * 20)
    assert first == second  # half of it was there
    other = await run(slots, [3] * 20)
    assert other != first
    assert await run(slots, [1] * 10 + [2] * 15) == first


async def test_slots_without_anything_in_common_take_turns() -> None:
    slots, _ = make(2)
    used = [await run(slots, [i] * 8) for i in range(4)]
    assert used[0] != used[1]
    assert used[2:] == used[:2]


async def test_another_salt_shares_nothing() -> None:
    slots, events = make(1)
    await run(slots, [1] * 8, "a")
    slot = await slots.take([1] * 8, "b", 0)
    assert not slot.reuse
    assert isinstance(events[-1], BlocksRemoved)
    slots.give_back(slot, [1] * 8)
    stored = [event for event in events if isinstance(event, BlocksStored)]
    assert {event.cache_salt for event in stored} == {"a", "b"}
    assert not set(stored[0].hashes) & set(stored[1].hashes)


async def test_a_cache_that_nobody_knows_is_not_reused_under_any_salt() -> None:
    slots, _ = make(1)
    await run(slots, [1] * 8, "a")
    slot = await slots.take([1] * 8, "b", 0)
    slots.give_back(slot, [])  # refused before it ran: the cache is still that of "a"
    for salt in ("b", "a"):
        slot = await slots.take([1] * 8, salt, 0)
        assert not slot.reuse
        slots.give_back(slot, [])


async def test_the_most_urgent_request_is_next_and_equals_keep_their_order() -> None:
    slots, _ = make(1)
    held = await slots.take([1], None, 0)
    order: list[str] = []

    async def wait(name: str, priority: int) -> None:
        slot = await slots.take([1], None, priority)
        order.append(name)
        slots.give_back(slot, [])

    tasks = [asyncio.create_task(wait(name, priority)) for name, priority in (("a", 0), ("b", 0), ("urgent", 5))]
    await asyncio.sleep(0)
    assert slots.load().waiting == 3
    slots.give_back(held, [])
    await asyncio.gather(*tasks)
    assert order == ["urgent", "a", "b"]


async def test_who_leaves_the_queue_keeps_nobody_waiting() -> None:
    slots, _ = make(1)
    held = await slots.take([1], None, 0)
    leaver, stayer = (asyncio.create_task(slots.take([1], None, 0)) for _ in range(2))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.sleep(0)
    slots.give_back(held, [])
    assert (await stayer).id == held.id
    slots.give_back(await stayer, [])
    assert slots.load().running == 0


async def test_who_leaves_at_the_moment_of_his_turn_gives_it_back() -> None:
    slots, _ = make(1)
    held = await slots.take([1], None, 0)
    leaver = asyncio.create_task(slots.take([1], None, 0))
    await asyncio.sleep(0)
    slots.give_back(held, [])
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    assert slots.load().running == 0


async def test_everybody_who_waits_can_be_sent_away() -> None:
    slots, _ = make(1)
    await slots.take([1], None, 0)
    waiting = asyncio.create_task(slots.take([1], None, 0))
    await asyncio.sleep(0)
    slots.fail(EngineDead("stopped"))
    with pytest.raises(EngineDead):
        await waiting


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=20), st.sampled_from([None, "s"]), st.booleans()), max_size=25))
def test_events_always_make_sense_and_tell_exactly_what_the_slots_hold(work: list[tuple[list[int], str | None, bool]]) -> None:
    slots, events = make(2, block=3)

    async def go() -> None:
        busy = []
        for prompt, salt, keep_running in work:
            if len(busy) == 2:
                slot, tokens = busy.pop(0)
                slots.give_back(slot, tokens)
            slot = await slots.take(prompt, salt, 0)
            if keep_running:
                busy.append((slot, [*prompt, 1, 2, 0]))
            else:
                slots.give_back(slot, prompt)
        for slot, tokens in busy:
            slots.give_back(slot, tokens)

    asyncio.run(go())
    replay_kv_events(events, 3)
    present: set[int | bytes] = set()
    for event in events:
        if isinstance(event, BlocksStored):
            assert not present & set(event.hashes)
            present |= set(event.hashes)
        elif isinstance(event, BlocksRemoved):
            present -= set(event.hashes)
    held = {block for slot in slots._all for block in slot.hashes}  # pyright: ignore[reportPrivateUsage]
    assert present == held
