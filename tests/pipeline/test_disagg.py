"""Prefill and decode on different workers, with the simulated engine: hand-over, fall-back, failure, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

from dynamo_core.config.schema import Disaggregation, Queue, Router, Use
from dynamo_core.context import Context
from dynamo_core.errors import AllBusy, Cancelled, Unavailable
from dynamo_core.pipeline import disagg
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints, Request, Stops

PROMPT = list(range(300, 520))


def use(role: str, **options: Any) -> Use:
    return Use("sim", {"role": role, "pace_ms": 1.0, "block_size": 16, **options})


@asynccontextmanager
async def fleet(*roles: str, slow: float = 1.0, router: Router | None = None, engine: dict[str, Any] | None = None, max_requests: int | None = None,
                **settings: Any) -> AsyncIterator[Cluster]:
    """One worker of each role, its component named after it. :param max_requests: of decode workers."""
    async with Cluster.up(workers=0, engine=use("aggregated"), router=router) as cluster:
        cluster.catalog._config = attrs.evolve(cluster.config, disaggregation=Disaggregation(**settings))
        for role in roles:
            limit = {"max_requests": max_requests} if max_requests is not None and role == "decode" else {}
            await cluster.add(engine=use(role, **{"pace_ms": slow, **(engine or {})}), name=role, **limit)
        async with asyncio.timeout(20):
            while sum(w["proven"] for model in cluster.catalog.status()["models"].values() for w in model["workers"]) != len(roles):
                await asyncio.sleep(0.01)
        yield cluster


async def alone() -> list[int]:
    async with fleet("aggregated") as cluster:
        return (await read_all(await cluster.generate(PROMPT, max_tokens=20)))[1]


def roles(generation: Any) -> list[str]:
    return [label.rpartition("-")[0] for label in generation.workers]


class Watched:
    """An engine, and every request that it gets."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seen: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, request: Request, context: Any) -> Any:
        self.seen.append(request)
        return self._engine.generate(request, context)


def watch(cluster: Cluster, number: int) -> list[Request]:
    """Every request that a worker's engine gets from now on."""
    worker: Any = cluster.worker(number)
    worker.engine = Watched(worker.engine)
    return worker.engine.seen


async def idle(cluster: Cluster) -> None:
    async with asyncio.timeout(20):
        while any(not member.worker.engine._scheduler.idle or member.worker.admission.in_flight for member in cluster.members if member):  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)


async def test_prefill_reads_the_prompt_and_decode_says_what_one_worker_would() -> None:
    expected = await alone()
    async with fleet("prefill", "decode") as cluster:
        read, written = watch(cluster, 0), watch(cluster, 1)
        generation = await cluster.generate(PROMPT, max_tokens=20)
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode"]
        assert len(generation.decisions) == 2
        assert (read[-1].stops.max_tokens, read[-1].transfer) == (1, None)
        assert written[-1].transfer == {"tokens": len(PROMPT)}
        assert written[-1].stops.max_tokens == 20
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (len(PROMPT), 20)


async def test_cached_tokens_are_those_of_the_worker_that_read_the_prompt() -> None:
    async with fleet("prefill", "decode") as cluster:
        for cached in (0, len(PROMPT) // 16 * 16):
            generation = await cluster.generate(PROMPT, max_tokens=3)
            await read_all(generation)
            assert generation.usage.cached_tokens == cached


async def test_an_aggregated_worker_is_left_alone_while_both_roles_are_there_and_helps_when_one_is_not() -> None:
    async with fleet("aggregated", "prefill", "decode") as cluster:
        first = await cluster.generate(PROMPT, max_tokens=3)
        await read_all(first)
        assert roles(first) == ["prefill", "decode"]
        await cluster.drain(2)
        second = await cluster.generate(PROMPT, max_tokens=3)
        await read_all(second)
        assert roles(second) == ["aggregated"]


async def test_without_prefill_workers_decode_reads_the_prompt_itself() -> None:
    expected = await alone()
    async with fleet("prefill", "decode") as cluster:
        await cluster.drain(0)
        generation = await cluster.generate(PROMPT, max_tokens=20)
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["decode"]


async def test_without_prefill_workers_and_without_fallback_the_model_says_what_is_missing() -> None:
    async with fleet("prefill", "decode", fallback=False) as cluster:
        await read_all(await cluster.generate(PROMPT, max_tokens=3))
        await cluster.drain(0)
        with pytest.raises(Unavailable, match="they need prefill workers beside them"):
            cluster.catalog.get("sim")


async def test_a_prefill_worker_that_dies_is_replaced_by_another() -> None:
    expected = await alone()
    async with fleet("prefill", "prefill", "decode", slow=30.0) as cluster:
        starting = asyncio.create_task(cluster.generate(PROMPT, max_tokens=20))
        async with asyncio.timeout(20):
            while not any(cluster.worker(i).admission.in_flight for i in (0, 1)):
                await asyncio.sleep(0.001)
        await cluster.kill(0 if cluster.worker(0).admission.in_flight else 1)
        generation = await starting
        assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "prefill", "decode"]


async def test_a_decode_worker_that_dies_is_replaced_by_one_that_reads_everything_itself() -> None:
    expected = await alone()
    async with fleet("prefill", "decode", "decode", slow=5.0) as cluster:
        generation = await cluster.generate(PROMPT, max_tokens=20)
        tokens = [token for delta in await generation.read() for token in delta.token_ids]
        victim, other = (1, 2) if cluster.worker(1).admission.in_flight else (2, 1)
        resumed = watch(cluster, other)
        await cluster.kill(victim)
        tokens += (await read_all(generation))[1]
        assert tokens == expected
        assert resumed[-1].transfer is None
        assert roles(generation) == ["prefill", "decode", "decode"]


async def test_a_client_that_leaves_during_prefill_still_has_its_blocks_fetched_and_no_more() -> None:
    async with fleet("prefill", "decode", slow=20.0) as cluster:
        written = watch(cluster, 1)
        starting = asyncio.create_task(cluster.generate(PROMPT, max_tokens=500))
        async with asyncio.timeout(20):
            while not cluster.worker(0).admission.in_flight:
                await asyncio.sleep(0.001)
        starting.cancel()
        assert isinstance((await asyncio.gather(starting, return_exceptions=True))[0], asyncio.CancelledError)
        async with asyncio.timeout(20):
            while not written:
                await asyncio.sleep(0.005)
        assert written[0].transfer is not None
        await idle(cluster)


async def test_a_client_that_leaves_before_the_first_token_waits_for_the_blocks_and_one_that_leaves_after_it_does_not() -> None:
    async with fleet("prefill", "decode", slow=5.0) as cluster:
        for reads in (0, 1):
            generation = await cluster.generate(PROMPT, max_tokens=500)
            for _ in range(reads):
                await generation.read()
            generation.cancel()
            await idle(cluster)


async def test_short_prompts_stay_where_they_are_generated() -> None:
    async with fleet("prefill", "decode", min_prompt=100) as cluster:
        for length, wanted in ((50, ["decode"]), (220, ["prefill", "decode"])):
            generation = await cluster.generate(PROMPT[:length], max_tokens=3)
            await read_all(generation)
            assert roles(generation) == wanted


async def test_a_thousand_cancelled_requests_leave_no_block_in_use() -> None:
    async with fleet("prefill", "decode") as cluster:
        async def leave(i: int) -> None:
            starting = asyncio.create_task(cluster.generate([i, *PROMPT], max_tokens=300))
            if i % 3 == 0:
                await asyncio.sleep(0.001 * (i % 7))
                starting.cancel()
            if not isinstance(generation := (await asyncio.gather(starting, return_exceptions=True))[0], BaseException):
                if i % 3 == 1:
                    await generation.read()
                generation.cancel()

        for batch in range(0, 1000, 100):
            await asyncio.gather(*(leave(batch + i) for i in range(100)))
        await idle(cluster)
        for member in cluster.members:
            assert member is not None
            assert member.worker.engine._scheduler.pool.used == 0  # type: ignore[attr-defined]


async def test_each_router_is_asked_for_its_own_role_so_that_pins_find_the_worker_that_they_name() -> None:
    async with fleet("prefill", "prefill", "decode", "decode") as cluster:
        ids = [member.worker.runtime.id for member in cluster.members if member]  # type: ignore[attr-defined]
        for reads, writes in [(0, 2), (1, 3), (1, 2), (0, 3)]:
            generation = await cluster.generate(PROMPT, max_tokens=5, hints=Hints(prefill_instance=ids[reads], instance=ids[writes]))
            await read_all(generation)
            records = [cluster.catalog.decision(id) for id in generation.decisions]
            assert [(r["request"]["role"], r["worker"][0]) for r in records if r] == [("prefill", ids[reads]), ("decode", ids[writes])]


@pytest.mark.parametrize("protocol", ["prefill-first", "bootstrap"])
async def test_clients_that_leave_while_they_wait_for_a_prefill_worker_leave_the_queue_at_once(protocol: str) -> None:
    async with fleet("prefill", "decode", slow=50.0, router=Router(queue=Queue(prefill_tokens=0)), engine={"protocol": protocol}) as cluster:
        served = watch(cluster, 0)
        first = asyncio.create_task(cluster.generate(PROMPT, max_tokens=3))
        queue = cluster.catalog.get("sim").dispatcher("prefill")  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while not served:
                await asyncio.sleep(0.001)
        contexts = [Context(f"leaves-{i}") for i in range(4)]
        leave = [asyncio.create_task(cluster.generate([i, *PROMPT], context=context)) for i, context in enumerate(contexts)]
        async with asyncio.timeout(20):
            while queue.waiting < 4:
                await asyncio.sleep(0.001)
        for task, context in zip(leave[:2], contexts[:2], strict=True):
            context.cancel("client disconnected")
            with pytest.raises(Cancelled):
                await task
        for task in leave[2:]:
            task.cancel()
        await asyncio.gather(*leave, return_exceptions=True)
        async with asyncio.timeout(20):
            while queue.waiting:
                await asyncio.sleep(0.001)
        await read_all(await first)
        assert len(served) == 1
        await idle(cluster)


@pytest.mark.parametrize("protocol", ["prefill-first", "bootstrap"])
async def test_blocks_come_to_a_decode_worker_for_many_requests_at_once_whatever_the_queue_says_of_prefills(protocol: str) -> None:
    engine = {"protocol": protocol, "transfer_ms": 100.0}
    async with fleet("prefill", "decode", router=Router(queue=Queue(prefill_tokens=0)), engine=engine) as cluster:
        generations = await asyncio.gather(*(cluster.generate([i, *PROMPT], max_tokens=3) for i in range(4)))
        for generation in generations:
            await read_all(generation)
            record = cluster.catalog.decision(generation.decisions[-1])
            assert record is not None
            assert (record["request"]["role"], record["waited"]) == ("decode", 0)


async def test_a_prompt_that_was_read_waits_for_a_decode_worker_with_room_and_is_not_read_again() -> None:
    expected = await alone()
    async with fleet("prefill", "decode", "decode", slow=5.0, max_requests=1) as cluster:
        read, *written = watch(cluster, 0), watch(cluster, 1), watch(cluster, 2)
        generations = await asyncio.gather(*(cluster.generate(PROMPT, max_tokens=20) for _ in range(5)))
        assert [(await read_all(generation))[1] for generation in generations] == [expected] * 5
        assert len(read) == 5
        assert all(request.transfer is not None for requests in written for request in requests)


async def test_no_prompt_is_read_while_decode_is_known_to_be_full() -> None:
    async with fleet("prefill", "decode") as cluster:
        read = watch(cluster, 0)
        decode: Any = cluster.catalog.get("sim").dispatcher("decode")  # type: ignore[attr-defined]
        decode.router.inhibit(next(iter(decode.router.workers)), 60.0, "it said that it is at capacity", busy=True)
        with pytest.raises(AllBusy, match="at capacity"):
            await cluster.generate(PROMPT, max_tokens=3)
        assert not read


async def test_a_client_that_left_is_not_given_another_decode_worker_when_the_first_one_is_lost() -> None:
    async with fleet("prefill", "decode", "decode", slow=1.0, engine={"transfer_ms": 1000.0}) as cluster:
        context = Context("leaves")
        generation = await cluster.generate(PROMPT, max_tokens=20, context=context)
        reading = asyncio.create_task(read_all(generation))
        async with asyncio.timeout(20):
            while not (busy := [i for i in (1, 2) if cluster.worker(i).admission.in_flight]):
                await asyncio.sleep(0.001)
        other = watch(cluster, 3 - busy[0])
        await asyncio.sleep(0)  # it reads
        context.cancel("client disconnected")
        await cluster.kill(busy[0])
        with pytest.raises(Cancelled):
            await reading
        assert not other


async def test_a_prefill_worker_that_hangs_after_its_answer_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disagg, "LAST", 0.05)
    expected = await alone()
    async with fleet("prefill", "decode") as cluster:
        engine: Any = cluster.worker(0).engine

        class Hangs(Watched):
            async def generate(self, request: Request, context: Any) -> AsyncIterator[Any]:
                async for output in engine.generate(request, context):
                    yield output
                await asyncio.Event().wait()

        cluster.worker(0).engine = Hangs(engine)  # type: ignore[assignment]
        async with asyncio.timeout(20):
            generation = await cluster.generate(PROMPT, max_tokens=20)
            assert (await read_all(generation))[1] == expected
        assert roles(generation) == ["prefill", "decode"]
        await idle(cluster)


async def test_who_has_another_place_to_go_still_tries_each_decode_worker_here() -> None:
    async with fleet("decode", "decode", slow=50.0, max_requests=1) as cluster:
        model: Any = cluster.catalog.get("sim")
        requests = [Request(id=f"r{i}", model="sim", token_ids=PROMPT, stops=Stops(max_tokens=20), transfer={"tokens": len(PROMPT)}) for i in range(2)]
        streams = [model.tokens(request, Context(request.id), "decode") for request in requests]
        decode = model.dispatcher("decode")
        for stream in streams:
            stream.elsewhere = True
        await streams[0].start()
        await streams[0].read()
        taken = streams[0].workers[0]
        other = next(worker for worker in decode.router.workers if decode.label(worker) != taken)
        decode.router.inhibit(other, 0.02, "so that the full one is asked first")
        await streams[1].start()
        await asyncio.sleep(0.03)
        assert await streams[1].read()
        assert streams[1].workers == [taken, decode.label(other)]
        for stream in streams:
            stream.cancel("enough")
