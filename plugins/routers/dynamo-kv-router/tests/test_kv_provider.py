"""The provider without a fleet: as virtual time uses it."""

from __future__ import annotations

import asyncio
import weakref
from typing import Any

import pytest

from dynamo_core.cards import ModelCard
from dynamo_core.engines.contract import BlocksCleared, BlocksRemoved, BlocksStored
from dynamo_core.kv.hashing import Hasher, digest_of
from dynamo_core.kv.wire import News, encode
from dynamo_core.routing.contract import Attached, FactProvider, FollowsEvents, FollowsFleet, FollowsRequests, Reports, RoutingRequest, Worker
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.types import Instance
from dynamo_kv_router.facts import DISK_OVERLAP_TOKENS, HOST_OVERLAP_TOKENS, INDEX_AGE, INDEX_PROBLEM, INDEX_STATE, PREDICTED_TOKENS
from dynamo_kv_router.load import KvLoad
from dynamo_kv_router.provider import KvIndex

A, B, B1 = Worker(1), Worker(2), Worker(2, 1)
FLEET = (A, B, B1)
PROMPT = list(range(100, 165))
"""Four blocks and a token."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def card(**more: Any) -> ModelCard:
    return ModelCard(**{"name": "m", "block_size": 16, "kv_events": True, **more})


def instance(id: int) -> Instance:
    return Instance(id=id, namespace="n", component="backend", endpoint="generate", address=f"tcp://127.0.0.1:{id}")


def provider(*, known: ModelCard | None = None, **options: Any) -> KvIndex:
    found = KvIndex(**options)
    found.clock = Clock()
    for worker in FLEET:
        found.joined(worker, instance(worker.instance), known or card())
    return found


def request(ids: list[int] = PROMPT, **more: Any) -> RoutingRequest:
    return RoutingRequest("r", "m", ids, len(ids), **more)


def stored(blocks: int, first: int = 0, tier: str = "device", **more: Any) -> BlocksStored:
    return BlocksStored([*range(first + 1, blocks + 1)], first or None, PROMPT[first * 16 : blocks * 16], tier, **more)


def asked(found: KvIndex, fact: Any = OVERLAP_TOKENS, request: RoutingRequest | None = None) -> list[Any]:
    return [*found.columns(request or globals()["request"](), FLEET)[fact]]


def test_it_is_a_provider_with_every_capability_that_it_uses():
    for capability in (FactProvider, FollowsFleet, FollowsRequests, FollowsEvents, Attached, Reports):
        assert isinstance(KvIndex(), capability)


def test_events_that_are_fed_to_it_are_found_by_worker_and_rank():
    found = provider()
    found.feed(A, [stored(2)])
    found.feed(B1, [stored(4)])
    assert asked(found) == [32, 0, 64]
    assert asked(found, INDEX_STATE) == ["events", "syncing", "events"]
    assert asked(found, INDEX_AGE)[0] == 0.0
    found.feed(B1, [BlocksRemoved([3])])
    assert asked(found) == [32, 0, 32]
    found.feed(A, [BlocksCleared()])
    assert asked(found) == [0, 0, 32]


def test_the_last_token_is_never_counted_as_engines_have_to_compute_it():
    found = provider()
    found.feed(A, [stored(4)])
    assert asked(found, request=request(PROMPT[:64])) == [48, 0, 0]
    assert asked(found, request=request(PROMPT[:65])) == [64, 0, 0]
    assert asked(found, request=request(PROMPT[:1])) == asked(found, request=request([])) == [0, 0, 0]


def test_what_is_on_host_and_disk_counts_beyond_the_device():
    found = provider()
    found.feed(A, [stored(4), BlocksStored([2, 3], None, [], "host"), BlocksStored([4], None, [], "disk"), BlocksRemoved([4, 3, 2])])
    columns = found.columns(request(), FLEET)
    assert [columns[fact][0] for fact in (OVERLAP_TOKENS, HOST_OVERLAP_TOKENS, DISK_OVERLAP_TOKENS)] == [16, 32, 16]


def test_adapters_salts_and_media_share_nothing():
    found = provider()
    found.feed(A, [stored(4)])
    found.feed(B, [stored(4, adapter="lora", cache_salt="tenant")])
    found.feed(B1, [stored(4, media=[[], [digest_of("cat")], [digest_of("cat")], []])])
    assert asked(found) == [64, 0, 16]
    assert asked(found, request=request(adapter="lora")) == [0, 0, 0]
    assert asked(found, request=request(adapter="lora", cache_salt="tenant")) == [0, 64, 0]
    assert asked(found, request=request(media=[{"digest": "cat", "start": 20, "length": 20}])) == [16, 0, 64]


def test_what_was_sent_is_predicted_until_events_say_it():
    found = provider(predict=5.0)
    found.booked(request(), A, 0)
    assert (asked(found), asked(found, PREDICTED_TOKENS)) == ([64, 0, 0], [64, 0, 0])
    found.feed(A, [stored(2)])
    assert (asked(found), asked(found, PREDICTED_TOKENS)) == ([64, 0, 0], [32, 0, 0])
    found.clock.now += 5.0  # type: ignore[attr-defined]
    assert (asked(found), asked(found, PREDICTED_TOKENS)) == ([32, 0, 0], [0, 0, 0])


def test_prediction_can_be_turned_off():
    found = provider(predict=0.0)
    found.booked(request(), A, 0)
    assert asked(found) == [0, 0, 0]


@pytest.mark.parametrize("known", [card(kv_events=False), card()])
def test_without_events_it_goes_by_what_was_sent(known: ModelCard):
    found = provider(known=known, mode="approximate" if known.kv_events else "auto", ttl=50.0)
    assert asked(found, INDEX_STATE) == ["approximate"] * 3
    found.booked(request(), A, 0)
    found.clock.now += 30.0  # type: ignore[attr-defined]
    found.booked(request(PROMPT[:40]), A, 32)
    found.clock.now += 30.0  # type: ignore[attr-defined]
    assert asked(found) == [32, 0, 0]
    assert not found.problems()


def test_without_events_a_worker_is_assumed_to_hold_no_more_than_fits():
    found = provider(known=card(kv_events=False, total_blocks=3))
    found.booked(request(), A, 0)
    assert asked(found) == [48, 0, 0]
    other = request([*range(500, 540)])
    found.booked(other, A, 0)
    assert asked(found) == [0, 0, 0]
    assert asked(found, request=other) == [32, 0, 0]


def test_events_can_be_expected_of_workers_whose_card_does_not_promise_them():
    found = provider(known=card(kv_events=False), mode="events", silence=2.0)
    found.clock.now += 2.5  # type: ignore[attr-defined]
    assert len(found.problems()) == 3
    assert asked(found, INDEX_STATE) == ["degraded"] * 3
    assert "silent" in asked(found, INDEX_PROBLEM)[0]


def test_a_worker_that_comes_back_under_another_id_starts_empty():
    found = provider()
    found.feed(A, [stored(4)])
    found.left(A)
    assert asked(found) == [0, 0, 0]
    again = Worker(9)
    found.joined(again, instance(9), card())
    assert [*found.columns(request(), (again, B))[OVERLAP_TOKENS]] == [0, 0]
    found.feed(again, [stored(4)])
    assert [*found.columns(request(), (again, B))[OVERLAP_TOKENS]] == [64, 0]
    found.feed(A, [stored(4)])


def test_columns_that_were_given_do_not_change_later():
    found = provider()
    given = found.columns(request(), FLEET)
    before = {fact: [*column] for fact, column in given.items()}
    found.feed(A, [stored(4)])
    found.booked(request(), B, 0)
    found.columns(request(), FLEET)
    assert {fact: [*column] for fact, column in given.items()} == before


def test_a_request_is_named_once_for_all_who_ask_and_a_changed_salt_or_medium_gives_other_names(monkeypatch: pytest.MonkeyPatch):
    found, load = provider(), KvLoad()
    load.joined(A, instance(1), card())
    prompt, others = request(), [request() for _ in range(12)]
    made: list[int] = []
    monkeypatch.setattr(Hasher, "keys", lambda self, ids, *more, keys=Hasher.keys: made.append(len(ids)) or keys(self, ids, *more))
    for _ in range(3):  # as a queue looks at all that wait, again and again
        for waiting in (prompt, *others):
            found.columns(waiting, FLEET)
            load.columns(waiting, FLEET)
    found.booked(prompt, A, 0)
    load.booked(prompt, A, 0)
    assert len(made) == 13
    ended = weakref.ref(found.keys(others.pop()))
    del waiting
    assert ended() is None  # names go with their request
    assert found.keys(request(cache_salt="x")).tolist() != found.keys(prompt).tolist()
    assert found.keys(request(media=[{"digest": "cat"}])).tolist() != found.keys(prompt).tolist()
    assert found.keys(prompt).tolist() == found.keys(request([*PROMPT])).tolist()


def test_workers_of_other_block_sizes_are_named_and_not_used():
    found = provider()
    found.joined(Worker(7), instance(7), card(block_size=32))
    (problem,) = found.problems().values()
    assert "blocks of 32 tokens" in problem


def test_news_that_come_before_the_fleet_s_secret_is_known_are_no_problem_of_the_worker():
    """So it is in the first moments of a provider that a reload has made."""
    found = provider()
    found.on_event("kv", A.instance, encode(News(5, 1, 0, found.hasher.fingerprint ^ 1, 16, [])))
    assert asked(found, INDEX_PROBLEM) == ["", "", ""]
    assert not found.problems()


class Surroundings:
    """Of a fleet in which nobody answers."""

    model = "m"

    async def secret(self, name: str) -> bytes:
        return b"s" * 32


async def test_what_was_sent_long_ago_is_forgotten_while_nobody_asks():
    found = provider(known=card(kv_events=False), ttl=60.0, silence=0.2)
    await found.attach(Surroundings())  # type: ignore[arg-type]
    for i in range(200):
        found.booked(request([i] * 65), A, 0)
    assert found.status()["blocks"] == 800
    found.clock.now += 61  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while found.status()["blocks"]:
            await asyncio.sleep(0.01)
    await found.detach()
