"""Images on the way through the fleet: encoded once, by whom it is meant for, and known to caches by their content."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

from dynamo_core.config.schema import Disaggregation, Queue, Router, Use
from dynamo_core.context import Context
from dynamo_core.errors import NoWorker, RequestError
from dynamo_core.pipeline.dispatch import routing_request
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Request, Stops, TextOptions

PROMPT = list(range(300, 400))


def use(role: str, **options: Any) -> Use:
    return Use("sim", {"role": role, "pace_ms": 1.0, "block_size": 16, "sees": True, "encode_ms": 5.0, **options})


@asynccontextmanager
async def fleet(*roles: str, fallback: bool = True, queue: Queue | None = None, **options: Any) -> AsyncIterator[Cluster]:
    async with Cluster.up(workers=0, engine=use("aggregated"), router=Router(use=Use("kv"), queue=queue)) as cluster:
        cluster.catalog._config = attrs.evolve(cluster.config, disaggregation=Disaggregation(fallback=fallback))
        for role in roles:
            await cluster.add(engine=use(role, **options), name=role)
        await cluster.wait_ready(len(roles))
        yield cluster


def image(digest: str) -> dict[str, Any]:
    return {"type": "image", "mime": "image/png", "digest": digest, "data": b"\x89PNG" + digest.encode(), "start": 0, "length": len(PROMPT)}


async def ask(cluster: Cluster, *digests: str, id: str = "r") -> Any:
    request = Request(id=id, model="sim", token_ids=PROMPT, stops=Stops(max_tokens=12), media=[image(digest) for digest in digests] or None)
    return await cluster.model.start(request, TextOptions(), Context(id))


async def said(cluster: Cluster, *digests: str) -> tuple[list[int], list[str], Any]:
    generation = await ask(cluster, *digests)
    ids = (await read_all(generation))[1]
    return ids, [label.rpartition("-")[0] for label in generation.workers], generation


def watch(cluster: Cluster, number: int) -> list[Request]:
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


async def test_the_bytes_go_on_where_the_encode_worker_says_that_they_are_needed() -> None:
    async with fleet("encode", "aggregated") as cluster:
        engine: Any = cluster.worker(0).engine

        class Asking:
            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            async def generate(self, request: Request, context: Any) -> AsyncIterator[Any]:
                async for output in engine.generate(request, context):
                    if output.transfer is not None:
                        for encoded in output.transfer["media"]:
                            encoded["with_data"] = True
                    yield output

        cluster.worker(0).engine = Asking()  # type: ignore[assignment]
        seen = watch(cluster, 1)
        await said(cluster, "cat")
        assert seen[0].media == [{**image("cat"), "encoded": {"digest": "cat", "with_data": True}}]


async def test_images_go_to_the_encode_worker_and_only_what_it_made_of_them_goes_on() -> None:
    async with fleet("aggregated") as cluster:
        expected = [(await said(cluster, *digests))[0] for digests in (("cat",), ("dog",), ())]
    assert len({tuple(ids) for ids in expected}) == 3
    for roles in (("encode", "aggregated"), ("encode", "prefill", "decode")):
        async with fleet(*roles) as cluster:
            read = [watch(cluster, number) for number in range(len(roles))]
            ids, workers, generation = await said(cluster, "cat")
            assert (ids, workers) == (expected[0], list(roles))
            assert len(generation.decisions) == len(roles)
            assert read[0][0].media == [image("cat")]
            for seen in read[1:]:
                assert seen[0].media == [{**{key: value for key, value in image("cat").items() if key != "data"}, "encoded": {"digest": "cat"}}]
            assert (await said(cluster, "dog"))[0] == expected[1]
            assert (await said(cluster))[:2] == (expected[2], list(roles[1:])), "text needs no encoding"


async def test_without_an_encode_worker_whoever_reads_the_prompt_encodes() -> None:
    async with fleet("encode", "aggregated") as cluster:
        read = watch(cluster, 1)
        await cluster.drain(0)
        assert (await said(cluster, "cat"))[1] == ["aggregated"]
        assert read[0].media == [image("cat")]


async def test_an_encode_worker_that_dies_is_replaced_or_done_without() -> None:
    for roles, expected in ((("encode", "encode", "aggregated"), ["encode", "encode", "aggregated"]), (("encode", "aggregated"), ["encode", "aggregated"])):
        async with fleet(*roles, encode_ms=300.0) as cluster:
            starting = asyncio.create_task(said(cluster, "cat"))
            encoders = range(roles.count("encode"))
            async with asyncio.timeout(20):
                while not any(cluster.worker(i).admission.in_flight for i in encoders):
                    await asyncio.sleep(0.002)
            await cluster.kill(next(i for i in encoders if cluster.worker(i).admission.in_flight))
            assert (await starting)[1] == expected


async def test_without_fallback_images_that_nobody_encodes_fail() -> None:
    async with fleet("encode", "aggregated", fallback=False, encode_ms=300.0) as cluster:
        starting = asyncio.create_task(said(cluster, "cat"))
        async with asyncio.timeout(20):
            while not cluster.worker(0).admission.in_flight:
                await asyncio.sleep(0.002)
        await cluster.kill(0)
        with pytest.raises(NoWorker):
            await starting


async def test_a_client_that_leaves_while_its_images_are_encoded_stops_the_encoding() -> None:
    async with fleet("encode", "aggregated", encode_ms=60_000.0) as cluster:
        starting = asyncio.create_task(ask(cluster, "cat"))
        async with asyncio.timeout(20):
            while not cluster.worker(0).admission.in_flight:
                await asyncio.sleep(0.002)
            starting.cancel()
            while cluster.worker(0).admission.in_flight:
                await asyncio.sleep(0.002)


async def test_equal_images_share_cached_blocks_and_others_do_not_and_the_router_knows() -> None:
    async with fleet("aggregated") as cluster:
        for digests, cached in ((("cat",), 0), (("cat",), 96), (("dog",), 0), ((), 0), (("cat", "dog"), 0), (("dog",), 96)):
            _, _, generation = await said(cluster, *digests)
            assert generation.usage.cached_tokens == cached, digests
            await asyncio.sleep(0.1)  # what the cache stored has to reach the router
            decision = cluster.catalog.decision(generation.decisions[0])
            assert decision is not None
            assert "PNG" not in str(decision), "records hold no images"
        for digests, known in ((("cat",), 96), (("bird",), 0)):
            request = Request(id="dry", model="sim", token_ids=PROMPT, stops=Stops(max_tokens=12), media=[image(digest) for digest in digests])
            assert cluster.model.dispatcher("aggregated").router.dry_run(routing_request(request)).overlap_tokens == known  # type: ignore[attr-defined]


async def test_an_engine_that_sees_nothing_refuses_images() -> None:
    async with fleet("aggregated", sees=False) as cluster:
        with pytest.raises(RequestError, match="does not support media"):
            await read_all(await ask(cluster, "cat"))


async def test_images_wait_for_no_room_to_prefill() -> None:
    async with fleet("encode", "aggregated", queue=Queue(prefill_tokens=0), encode_ms=100.0) as cluster:
        async def first(i: int) -> str:
            generation = await ask(cluster, f"{i}", id=f"r{i}")
            await read_all(generation)
            return generation.decisions[0]

        for id in await asyncio.gather(*(first(i) for i in range(4))):
            record = cluster.catalog.decision(id)
            assert record is not None
            assert (record["request"]["role"], record["waited"]) == ("encode", 0)
