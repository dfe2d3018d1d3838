"""Both roles at once, with the simulated engine: workers that meet by a number, pairs that fall together, and peers that do not fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import msgspec
import pytest

from dynamo_core.cards import Handover, ModelCard
from dynamo_core.config.schema import Disaggregation, Use
from dynamo_core.errors import RequestError, Unavailable
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Request

PROMPT = list(range(300, 520))
PAIR = ("prefill", "decode")


def use(role: str, **options: Any) -> Use:
    return Use("sim", {"role": role, "protocol": "bootstrap", "pace_ms": 1.0, "block_size": 16, **options})


@asynccontextmanager
async def fleet(*roles: str, slow: float = 1.0, fallback: bool = True) -> AsyncIterator[Cluster]:
    """One worker of each role, its component named after it."""
    async with Cluster.up(workers=0, engine=use("aggregated")) as cluster:
        cluster.catalog._config = attrs.evolve(cluster.config, disaggregation=Disaggregation(fallback=fallback))
        for role in roles:
            await cluster.add(engine=use(role, pace_ms=slow), name=role)
        await cluster.wait_ready(len(roles))
        yield cluster


async def alone() -> list[int]:
    async with fleet("aggregated") as cluster:
        return (await read_all(await cluster.generate(PROMPT, max_tokens=20)))[1]


def roles(generation: Any) -> list[str]:
    return [label.rpartition("-")[0] for label in generation.workers]


def watch(cluster: Cluster, number: int) -> list[Request]:
    """Every request that a worker's engine gets from now on."""
    engine: Any = cluster.worker(number).engine
    seen: list[Request] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def generate(self, request: Request, context: Any) -> Any:
            seen.append(request)
            return engine.generate(request, context)

    cluster.worker(number).engine = Watched()  # type: ignore[assignment]
    return seen


def used(cluster: Cluster, number: int) -> int:
    return cluster.worker(number).engine._scheduler.pool.used  # type: ignore[attr-defined]


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def idle(cluster: Cluster) -> None:
    members = [member.worker for member in cluster.members if member]
    await until(lambda: all(w.engine._scheduler.idle and not w.admission.in_flight for w in members))  # type: ignore[attr-defined]
    assert [w.engine._scheduler.pool.used for w in members] == [0] * len(members)  # type: ignore[attr-defined]


async def test_both_workers_have_the_request_at_once_and_the_answer_is_that_of_one_worker() -> None:
    expected = await alone()
    async with fleet(*PAIR, slow=20.0) as cluster:
        read, written = watch(cluster, 0), watch(cluster, 1)
        starting = asyncio.create_task(cluster.generate(PROMPT, max_tokens=20))
        await until(lambda: read and written)
        assert cluster.worker(0).engine._scheduler.pool.used or not cluster.worker(0).engine._scheduler.idle  # type: ignore[attr-defined]
        generation = await starting
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode"]
        assert len(generation.decisions) == 2
        assert (read[0].stops.max_tokens, written[0].stops.max_tokens) == (1, 20)
        room = read[0].transfer["room"]  # type: ignore[index]
        desk: Any = cluster.worker(0).engine
        assert written[0].transfer == {"room": room, "prefill_rank": 0, "host": "127.0.0.1", "port": desk._desk._server.sockets[0].getsockname()[1]}
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(PROMPT), 20)
        await idle(cluster)


async def test_cached_tokens_are_those_of_the_prefill_worker() -> None:
    async with fleet(*PAIR) as cluster:
        for cached in (0, len(PROMPT) // 16 * 16):
            generation = await cluster.generate(PROMPT, max_tokens=3)
            await read_all(generation)
            assert generation.usage.cached_tokens == cached


async def test_prefill_keeps_its_blocks_until_they_were_taken() -> None:
    async with Cluster.up(workers=0, engine=use("aggregated")) as cluster:
        await cluster.add(engine=use("prefill"), name="prefill")
        await cluster.add(engine=use("decode", transfer_ms=300.0), name="decode")
        await cluster.wait_ready(2)
        generation = await cluster.generate(PROMPT, max_tokens=3)
        await until(lambda: cluster.worker(0).engine._scheduler.idle and used(cluster, 0))  # type: ignore[attr-defined]
        assert used(cluster, 1) == 0
        await read_all(generation)
        await idle(cluster)


async def test_a_prefill_worker_that_dies_costs_a_new_pair_and_decode_is_not_blamed() -> None:
    expected = await alone()
    async with fleet("prefill", "prefill", "decode", slow=40.0) as cluster:
        generation = await cluster.generate(PROMPT, max_tokens=20)
        await until(lambda: any(cluster.worker(i).admission.in_flight for i in (0, 1)))
        await cluster.kill(0 if cluster.worker(0).admission.in_flight else 1)
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode", "prefill", "decode"]


async def test_a_request_that_is_pinned_to_a_decode_worker_stays_there_when_its_prefill_worker_dies() -> None:
    expected = await alone()
    async with fleet("prefill", "prefill", "decode", "decode", slow=40.0) as cluster:
        pinned = cluster.worker(3)
        generation = await cluster.generate(PROMPT, max_tokens=20, hints=Hints(instance=pinned.runtime.id))
        await until(lambda: any(cluster.worker(i).admission.in_flight for i in (0, 1)))
        await cluster.kill(0 if cluster.worker(0).admission.in_flight else 1)
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode", "prefill", "decode"]
        records = [cluster.catalog.decision(id) for id in generation.decisions]
        assert [record["worker"][0] for record in records[1::2] if record] == [pinned.runtime.id] * 2


async def test_when_the_only_prefill_worker_dies_decode_reads_the_prompt_itself() -> None:
    expected = await alone()
    async with fleet(*PAIR, slow=40.0) as cluster:
        generation = await cluster.generate(PROMPT, max_tokens=20)
        await until(lambda: cluster.worker(0).admission.in_flight)
        await cluster.kill(0)
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode", "decode"]


async def test_a_decode_worker_that_dies_before_and_after_its_first_token_is_replaced_by_a_new_pair() -> None:
    expected = await alone()
    for reads in (0, 1):
        async with fleet("prefill", "decode", "decode", slow=15.0) as cluster:
            generation = await cluster.generate(PROMPT, max_tokens=20)
            tokens: list[int] = []
            for _ in range(reads):
                tokens += [token for delta in await generation.read() for token in delta.token_ids]
            await until(lambda: cluster.worker(1).admission.in_flight or cluster.worker(2).admission.in_flight)
            await cluster.kill(1 if cluster.worker(1).admission.in_flight else 2)
            tokens += (await read_all(generation))[1]
            assert tokens == expected
            assert roles(generation) == ["prefill", "decode", "prefill", "decode"]
            await idle(cluster)


async def test_a_client_that_leaves_waits_for_the_blocks_and_nothing_stays_in_use() -> None:
    async with fleet(*PAIR, slow=10.0) as cluster:
        written = watch(cluster, 1)
        for reads in (0, 1):
            generation = await cluster.generate(PROMPT, max_tokens=500)
            for _ in range(reads):
                await generation.read()
            await until(lambda: cluster.worker(1).admission.in_flight)
            generation.cancel()
            if not reads:
                assert cluster.worker(1).admission.in_flight
            await idle(cluster)
        assert len(written) == 2


async def test_three_hundred_cancelled_requests_leave_no_block_in_use() -> None:
    async with fleet(*PAIR) as cluster:
        async def leave(i: int) -> None:
            starting = asyncio.create_task(cluster.generate([i, *PROMPT], max_tokens=300))
            if i % 3 == 0:
                await asyncio.sleep(0.001 * (i % 7))
                starting.cancel()
            if not isinstance(generation := (await asyncio.gather(starting, return_exceptions=True))[0], BaseException):
                if i % 3 == 1:
                    await generation.read()
                generation.cancel()

        for batch in range(0, 300, 50):
            await asyncio.gather(*(leave(batch + i) for i in range(50)))
        await idle(cluster)


class Carded:
    """An engine whose card says something else."""

    def __init__(self, engine: Any, **changes: Any) -> None:
        self._engine, self._changes = engine, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self, context: Any) -> ModelCard:
        card: ModelCard = await self._engine.start(context)
        changes = dict(self._changes)
        terms = changes.pop("terms", {})
        alone = changes.pop("decode_alone", True)
        return msgspec.structs.replace(card, handover=msgspec.structs.replace(card.handover, terms=terms, decode_alone=alone), **changes)


@pytest.fixture
def carded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the cards of each role are to say."""
    from dynamo_core.testing import cluster as module

    wanted: dict[str, dict[str, Any]] = {}
    real = module.build

    def build(use: Use, kind: str, plugins: Any) -> Any:
        built = real(use, kind, plugins)
        return Carded(built, **wanted[use.options["role"]]) if kind == "engine" and use.options.get("role") in wanted else built

    monkeypatch.setattr(module, "build", build)
    return wanted


@pytest.mark.parametrize(("prefill", "decode", "why"), [
    ({"terms": {"tensor_parallel": 1}}, {"terms": {"tensor_parallel": 2}}, "tensor parallel is 2 here and 1 there"),
    ({"terms": {"kv_layout": "NHD", "only_here": 1}}, {"terms": {"kv_layout": "HND"}}, "kv layout is HND here and NHD there"),
    ({}, {"block_size": 32}, "block size is 32 here and 16 there"),
])
async def test_workers_that_cannot_hand_over_are_refused_by_name_and_reason(
    carded: dict[str, dict[str, Any]], prefill: dict[str, Any], decode: dict[str, Any], why: str
) -> None:
    carded["prefill"], carded["decode"] = prefill, decode
    async with Cluster.up(workers=0, engine=use("aggregated")) as cluster:
        await cluster.add(engine=use("prefill"), name="prefill")
        await cluster.wait_ready(1)
        await cluster.add(engine=use("decode"), name="decode")
        await until(lambda: any(why in problem for problem in cluster.catalog.problems().values()))
        with pytest.raises(Unavailable, match=f"only prefill workers.*this decode worker cannot hand over with prefill worker prefill-.*{why}; make them alike"):
            cluster.catalog.get("sim")
        carded["decode"] = prefill
        await cluster.drain(1)
        await cluster.add(engine=use("decode"), name="decode")
        await cluster.wait_ready(2)
        generation = await cluster.generate(PROMPT, max_tokens=3)
        assert roles(generation) == ["prefill", "decode"]
        await read_all(generation)


async def test_workers_of_different_protocols_are_refused() -> None:
    async with fleet("prefill") as cluster:
        await cluster.add(engine=use("decode", protocol="prefill-first"), name="decode")
        await until(lambda: any("protocol is prefill-first here and bootstrap there" in why for why in cluster.catalog.problems().values()))


async def test_decode_workers_that_read_no_prompts_need_prefill_workers_and_refuse_what_cannot_be_handed_over(carded: dict[str, dict[str, Any]]) -> None:
    carded["decode"] = {"decode_alone": False}
    async with fleet(*PAIR) as cluster:
        with pytest.raises(RequestError, match="read no prompts"):
            await cluster.generate(PROMPT, max_tokens=3, n=2, temperature=1.0)
        await read_all(await cluster.generate(PROMPT, max_tokens=3))
        await cluster.drain(0)
        with pytest.raises(Unavailable, match="they need prefill workers beside them"):
            cluster.catalog.get("sim")


def test_terms_that_only_one_side_names_are_not_compared() -> None:
    from dynamo_core.cards import mismatch

    one = ModelCard(name="m", role="prefill", handover=Handover(terms={"tensor_parallel": 2}))
    assert mismatch(one, ModelCard(name="m", role="decode")) is None
