"""What the engine model learns, and that nothing it is told can break it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.types import Instance
from dynamo_kv_router.fit import Prices
from dynamo_kv_router.load_facts import BACKLOG, CONTEXT, DECODE_MS, DECODING, GENERATED, OUTPUT_TOKENS, PASS_MS, PREFILL_MS, RECENT, SAMPLES, STEP_MS
from dynamo_kv_router.model import LATE, EngineModel

INSTANCE = Instance(id=1, namespace="n", component="c", endpoint="e", address="a")
W = Worker(1)


class Clocked(EngineModel):
    now = 0.0


@pytest.fixture
def engine():
    provider = Clocked()
    provider.clock = lambda: provider.now
    provider.joined(W, INSTANCE, ModelCard(name="m", engine="x"))
    return provider


def ask(name: str, tokens: int) -> RoutingRequest:
    return RoutingRequest(name, "m", prompt_tokens=tokens)


def column(engine, fact):
    return engine.columns(ask("?", 100), [W])[fact][0]


def test_prices_of_an_engine_are_found_whatever_its_speed():
    for truth in ((20.0, 0.3, 2e-6), (2.0, 0.004, 1e-7)):
        rng, prices = random.Random(1), Prices((15.0, 0.02, 5e-7))
        for _ in range(400):
            prompt = rng.randrange(100, 30_000)
            uncached = rng.randrange(1, prompt)
            x = (1.0, float(uncached), uncached * (prompt - uncached / 2))
            prices.learn(x, sum(t * v for t, v in zip(truth, x, strict=True)) * rng.uniform(0.9, 1.1))
        for prompt in (500, 5_000, 25_000):
            x = (1.0, float(prompt), prompt * prompt / 2)
            assert prices.estimate(x) == pytest.approx(sum(t * v for t, v in zip(truth, x, strict=True)), rel=0.15)


def test_the_first_sample_sets_the_scale():
    prices = Prices((15.0, 0.02, 5e-7))
    x = (1.0, 4000.0, 8e6)
    prices.learn(x, 10 * prices.estimate(x))
    assert prices.estimate((1.0, 8000.0, 32e6)) == pytest.approx(10 * Prices((15.0, 0.02, 5e-7)).estimate((1.0, 8000.0, 32e6)), rel=0.5)


def test_prices_are_never_negative():
    rng, prices = random.Random(3), Prices((1.0, 1.0))
    for _ in range(300):
        prices.learn((1.0, rng.uniform(0, 100)), rng.uniform(0, 50))
        assert min(prices.values) >= 0.0


def test_a_stalled_engine_does_not_ruin_what_was_learned():
    prices = Prices((1.0, 0.1))
    for i in range(200):
        prices.learn((1.0, float(i)), 1.0 + 0.1 * i)
    prices.learn((1.0, 50.0), 60_000.0)
    assert prices.estimate((1.0, 50.0)) < 12.0


def test_backlog_shrinks_as_time_passes_and_ends_with_the_first_token(engine):
    engine.booked(ask("a", 10_000), W, 0)
    engine.booked(ask("b", 10_000), W, 9_000)
    whole = column(engine, BACKLOG)
    engine.now = 0.1
    assert column(engine, BACKLOG) == pytest.approx(whole - 100)
    engine.first_token("a", W, 0)
    assert 0 < column(engine, BACKLOG) < whole / 2
    engine.first_token("b", W, 9_000)
    assert column(engine, BACKLOG) == 0.0
    assert column(engine, DECODING) == 2


def test_what_was_sent_counts_less_and_less_whether_it_is_done_or_not(engine):
    engine.booked(ask("a", 10_000), W, 0)
    whole = column(engine, RECENT)
    assert 0 < whole == pytest.approx(column(engine, BACKLOG) - column(engine, PASS_MS))
    engine.now = LATE
    assert column(engine, RECENT) == pytest.approx(whole / math.e)
    engine.first_token("a", W, 0)
    engine.finished("a", W, "done")
    assert column(engine, RECENT) == pytest.approx(whole / math.e)
    engine.now = 100 * LATE
    assert column(engine, RECENT) == pytest.approx(0.0, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 2_000), st.integers(0, 1), st.integers(1, 20_000)), max_size=30))
def test_recent_work_is_the_sum_of_what_is_left_of_each_request(sent):
    """Over hours, too, and for each worker by itself."""
    engine, other, told = Clocked(), Worker(2), []
    engine.clock = lambda: engine.now
    for worker in (W, other):
        engine.joined(worker, INSTANCE, ModelCard(name="m", engine="x"))
    for i, (later, row, tokens) in enumerate(sent):
        engine.now += later
        engine.booked(ask(str(i), tokens), (W, other)[row], 0)
        told.append((engine.now, row, tokens))
    now = engine.now = engine.now + 7.0
    whole = [sum((0.02 * n + 5e-7 * n * n / 2) * math.exp((at - now) / LATE) for at, r, n in told if r == row) for row in (0, 1)]
    assert list(engine.columns(ask("?", 100), [W, other])[RECENT]) == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_who_asks_again_and_again_adds_only_what_is_new(engine):
    for i in range(20):
        engine.booked(ask(str(i), 10_000), W, 9_990 if i else 0)
    assert column(engine, RECENT) < 1.05 * (0.02 * 10_000 + 5e-7 * 10_000**2 / 2)


def test_prefill_and_decode_are_learned_from_what_is_seen(engine):
    rng = random.Random(5)
    for i in range(300):
        prompt = rng.randrange(1_000, 20_000)
        engine.booked(ask(f"{i}", prompt), W, 0)
        engine.now += (10 + prompt * 0.05) / 1e3
        engine.first_token(f"{i}", W, 0)
        for tokens in (16, 32, 48):
            engine.now += (tokens - (1 if tokens == 16 else tokens - 16)) * (5 + 1e-4 * column(engine, CONTEXT)) / 1e3
            engine.grew(f"{i}", W, tokens)
        engine.finished(f"{i}", W, "done")
        engine.now += rng.uniform(0, 1)
    assert column(engine, PREFILL_MS) == pytest.approx(0.05, rel=0.15)
    assert column(engine, DECODE_MS) == pytest.approx(1e-4, rel=0.3)
    assert column(engine, OUTPUT_TOKENS) == pytest.approx(48, rel=0.1)
    assert column(engine, SAMPLES) > 200
    assert column(engine, CONTEXT) == 0


def test_tokens_that_are_told_of_at_once_do_not_say_how_long_a_step_takes(engine):
    engine.booked(ask("late", 1_000), W, 0)
    engine.now += 5.0
    guess = column(engine, STEP_MS)
    engine.first_token("late", W, 0)
    engine.now += 1e-4
    engine.grew("late", W, 500)
    assert column(engine, STEP_MS) == guess
    engine.now += 0.05
    engine.grew("late", W, 510)
    assert column(engine, STEP_MS) != guess
    assert column(engine, GENERATED) == 510


@pytest.mark.parametrize("seed", range(5))
def test_prices_are_right_where_first_tokens_of_one_pass_come_one_after_the_other(engine, seed):
    """As they do on a busy machine, and where other frontends tell of theirs."""
    rng, number = random.Random(seed), 0
    for _ in range(150):
        jobs = {}
        for _ in range(rng.randrange(1, 5)):
            number += 1
            jobs[f"{number}"] = prompt = rng.randrange(50, 4_000)
            engine.booked(ask(f"{number}", prompt), W, 0)
            engine.now += 0.001
        names = rng.sample(sorted(jobs), len(jobs))
        engine.now += (16 + 0.015 * sum(jobs.values())) / 1e3
        for name in names:
            engine.first_token(name, W, 0)
            engine.now += rng.uniform(0, 0.002)
        for name in names:
            engine.finished(name, W, "done")
        engine.now += rng.choice([0.0, 0.5])
    assert column(engine, PREFILL_MS) == pytest.approx(0.015, rel=0.2)
    assert column(engine, PASS_MS) == pytest.approx(16, rel=0.4)


def test_requests_that_had_their_first_token_before_they_were_heard_of_teach_nothing(engine):
    for i in range(50):
        engine.booked(ask(f"{i}", 1000), W, 0)
        engine.first_token(f"{i}", W, 0)
        engine.now += 1.0
    assert column(engine, SAMPLES) == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_news_leaves_nothing_behind(engine, seed):
    rng, open_ = random.Random(seed), []
    for i in range(200):
        engine.now += rng.uniform(0, 0.05)
        match rng.randrange(5):
            case 0 | 1:
                engine.booked(ask(f"{i}", rng.randrange(0, 5000)), W, rng.randrange(0, 6000))
                open_.append(f"{i}")
            case 2 if open_:
                engine.first_token(rng.choice(open_), W, rng.choice([None, 0, 99999]))
            case 3 if open_:
                engine.grew(rng.choice(open_), W, rng.randrange(1, 500))
            case _ if open_:
                engine.finished(open_.pop(rng.randrange(len(open_))), W, rng.choice(["done", "failed", "cancelled"]))
            case _:
                engine.finished("nobody", W, "done")
        assert column(engine, BACKLOG) >= 0.0
    for name in open_:
        engine.finished(name, W, "cancelled")
    assert [column(engine, fact) for fact in (BACKLOG, DECODING, CONTEXT)] == [0.0, 0, 0]


def test_workers_with_alike_cards_learn_together():
    engine = Clocked()
    engine.clock = lambda: engine.now
    for i in (1, 2):
        engine.joined(Worker(i), INSTANCE, ModelCard(name="m", engine="x"))
    engine.joined(Worker(3), INSTANCE, ModelCard(name="m", engine="y"))
    for i in range(3):  # a prefill is a sample once the next one has ended
        engine.booked(ask(f"{i}", 1000), Worker(1), 0)
        engine.now += 1.0
        engine.first_token(f"{i}", Worker(1), 0)
    samples = engine.columns(ask("?", 100), [Worker(1), Worker(2), Worker(3)])[SAMPLES]
    assert samples[0] == samples[1] > 0 == samples[2]
