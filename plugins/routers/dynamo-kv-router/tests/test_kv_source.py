"""Numbers, gaps and answers, without a network."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dynamo_core.kv import Change, Hasher, News, Op
from dynamo_core.kv.wire import pack
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Instance
from dynamo_kv_router.source import WAITING, Source

HASHER = Hasher(b"s", 16)
INSTANCE = Instance(id=1, namespace="n", component="c", endpoint="generate", address="tcp://127.0.0.1:1")


def news(id: int, *keys: int, stream: int = 5, **more: object) -> News:
    changes = pack([Change(Op.ADD, 0, np.array(keys, np.uint64))]) if keys else []
    return News(stream, id, 0, HASHER.fingerprint, 16, changes, **more)  # pyright: ignore[reportArgumentType]


def keys(changes: object) -> list[int]:
    return [key for change in changes for key in change.keys.tolist()]  # type: ignore[attr-defined]


@pytest.fixture
def source() -> Source:
    source = Source(Worker(1), INSTANCE, publishes=True)
    source.answered([news(3, 1, 2, 3, whole=True)])
    return source


def test_what_follows_is_taken_and_what_is_repeated_is_not(source: Source):
    assert keys(source.take(news(4, 40), 0.0, HASHER)) == [40]
    assert keys(source.take(news(4, 40), 0.0, HASHER)) == []
    assert keys(source.take(news(2, 20), 0.0, HASHER)) == []
    assert not source.lost


def test_a_gap_is_asked_for_and_what_came_after_it_waits(source: Source):
    assert keys(source.take(news(6, 60), 0.0, HASHER)) == []
    assert source.lost
    assert (source.ask().stream, source.ask().after) == (5, 3)
    assert source.answered([news(4, 40), news(5, 50)])[0] is False
    assert keys(source.resumed()) == [60]
    assert not source.lost


def test_reordered_news_end_in_order(source: Source):
    source.take(news(5, 50), 0.0, HASHER)
    assert keys(source.take(news(4, 40), 0.0, HASHER)) == [40]
    assert keys(source.resumed()) == [50]
    assert not source.lost


def test_a_sign_of_life_gives_away_that_the_last_news_were_lost(source: Source):
    assert not source.take(news(3), 0.0, HASHER)
    assert not source.lost
    source.take(news(4), 0.0, HASHER)
    assert source.lost
    source.answered([news(4, 40)])
    assert not source.resumed()
    assert not source.lost


def test_a_worker_that_starts_to_count_anew_is_asked_for_everything(source: Source):
    source.take(news(1, 10, stream=6), 0.0, HASHER)
    assert source.lost
    whole, changes = source.answered([news(1, 10, stream=6, whole=True)])
    assert whole
    assert keys(changes) == [10]
    assert not source.lost


def test_an_answer_to_another_question_is_refused(source: Source):
    source.take(news(9, 90), 0.0, HASHER)
    for answer in ([], [news(6, 60)], [news(4, 40, stream=7)]):
        with pytest.raises(ValueError, match=r"empty|answered"):
            source.answered(answer)
    assert source.lost


def test_what_waits_is_bounded_and_what_falls_out_is_asked_for_again(source: Source):
    source.asking = True
    for id in range(5, WAITING + 100):
        source.take(news(id, id), 0.0, HASHER)
    assert len(source.waiting) == WAITING
    source.answered([news(4, 4)])
    assert keys(source.resumed()) == []
    assert source.lost
    assert source.ask().after == 4


def test_another_secret_or_block_size_is_refused_by_name_until_it_is_right(source: Source):
    assert not source.take(News(5, 4, 0, 1, 16, []), 1.0, HASHER)
    assert "another secret" in source.problem(1.0, 5.0)
    assert not source.take(News(5, 4, 0, HASHER.fingerprint, 32, []), 1.0, HASHER)
    assert "32 tokens" in source.problem(1.0, 5.0)
    source.take(news(3), 1.0, HASHER)
    assert source.problem(1.0, 5.0) == ""
    assert "silent" in source.problem(7.0, 5.0)


def test_unknown_levels_ops_and_half_keys_are_errors(source: Source):
    for row in ((9, 0, b""), (0, 7, b""), (0, 0, b"123")):
        with pytest.raises(ValueError):
            source.take(News(5, 4, 0, HASHER.fingerprint, 16, [row]), 0.0, HASHER)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_lost_repeated_or_reordered_the_end_is_the_whole_truth(seed: int):
    rng = random.Random(seed)
    source, held, written = Source(Worker(1), INSTANCE, publishes=True), set[int](), []

    def take(changes: object) -> None:
        for op, _, some in changes:  # type: ignore[attr-defined]
            (held.update if op is Op.ADD else held.difference_update)(some.tolist())

    truth: set[int] = set()
    on_the_way: list[News] = []
    for id in range(1, 120):
        gone = [*truth][: rng.randrange(2)]
        truth.difference_update(gone)
        truth.add(id)
        changes = [Change(Op.REMOVE, 0, np.array(gone, np.uint64)), Change(Op.ADD, 0, np.array([id], np.uint64))]
        written.append(News(5, id, 0, HASHER.fingerprint, 16, pack(changes)))
        on_the_way += [written[-1]] * rng.choice([0, 1, 1, 1, 2])
        if rng.random() < 0.3:
            rng.shuffle(on_the_way)
        while on_the_way and rng.random() < 0.8:
            take(source.take(on_the_way.pop(0), 0.0, HASHER))
        if source.lost and rng.random() < 0.3:
            ask = source.ask()
            if ask.after and ask.after >= id - rng.choice([5, 50]):
                whole, changes = source.answered(written[ask.after :] or [news(id, *truth, whole=True)])
            else:
                whole, changes = source.answered([news(id, *truth, whole=True)])
            if whole:
                held.clear()
            take(changes)
            take(source.resumed())
    take(source.take(news(119), 0.0, HASHER))
    if source.lost:
        whole, changes = source.answered([news(119, *truth, whole=True)])
        held.clear()
        take(changes)
        take(source.resumed())
    assert held == truth
    assert not source.lost
