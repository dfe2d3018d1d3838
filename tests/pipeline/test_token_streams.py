"""Token streams as a global router uses them: without text, by one role, and with somewhere else to go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from dynamo_core.config.schema import Migration, Use
from dynamo_core.context import Context
from dynamo_core.errors import RequestError, Unavailable
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.testing.cluster import Cluster
from dynamo_core.types import Output, Request, Sampling, Stops

PROMPT = list(range(300, 360))


class Watched:
    """An engine, and every request that it gets."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.seen: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, request: Request, context: Any) -> AsyncIterator[Output]:
        self.seen.append(request)
        return self._engine.generate(request, context)


def watch(cluster: Cluster) -> list[Watched]:
    watched = []
    for number in range(len(cluster.members)):
        worker: Any = cluster.worker(number)
        worker.engine = Watched(worker.engine)
        watched.append(worker.engine)
    return watched


def request(**fields: Any) -> Request:
    return Request(**{"id": "r1", "model": "sim", "token_ids": PROMPT, "sampling": Sampling(temperature=0.0), "stops": Stops(max_tokens=40, ignore_eos=True), **fields})


def fleet(**options: Any) -> Any:
    return Cluster.up(engine=Use("sim", {"pace_ms": 5.0, "block_size": 16, **options.pop("engine", {})}), **options)


async def serving(cluster: Cluster) -> int:
    async with asyncio.timeout(20):
        while True:
            for number, member in enumerate(cluster.members):
                if member is not None and member.worker.admission.in_flight:
                    return number
            await asyncio.sleep(0.001)


async def read(stream: TokenStream) -> list[int]:
    tokens: list[int] = []
    while outputs := await stream.read():
        tokens += [token for output in outputs for token in output.token_ids]
    return tokens


async def test_a_request_that_was_resumed_before_says_so_after_another_move() -> None:
    async with fleet() as cluster:
        whole: Any = cluster.model
        first = whole.tokens(request(), Context("r1"))
        await first.start()
        expected = await read(first)
        engines = watch(cluster)
        asked = request(token_ids=[*PROMPT, *expected[:4]], resumed=4, stops=Stops(max_tokens=36, ignore_eos=True))
        stream = whole.tokens(asked, Context("r1"))
        await stream.start()
        tokens = [token for output in await stream.read() for token in output.token_ids]
        await cluster.kill(await serving(cluster))
        tokens += await read(stream)
        assert expected[:4] + tokens == expected
        moved = next(seen for engine in engines for seen in engine.seen if seen.resumed > 4)
        assert len(moved.token_ids) - moved.resumed == len(PROMPT)


async def test_a_hand_over_is_not_repeated_with_blocks_that_are_gone() -> None:
    async with fleet(engine={"role": "decode"}) as cluster:
        engines = watch(cluster)
        model: Any = cluster.catalog.offered()["sim"]
        stream = model.tokens(request(transfer={"tokens": len(PROMPT)}), Context("r1"), role="decode")
        await stream.start()
        await stream.read()
        await cluster.kill(await serving(cluster))
        assert len(await read(stream)) > 0
        transfers = [seen.transfer for engine in engines for seen in engine.seen if seen.id == "r1"]
        assert sorted(transfers, key=repr) == [None, {"tokens": len(PROMPT)}]


@pytest.mark.parametrize("elsewhere", [True, False])
async def test_who_has_somewhere_else_to_go_does_not_wait_for_a_replacement(elsewhere: bool) -> None:
    async with fleet(workers=1, migration=Migration(wait=1.0 if not elsewhere else 1000.0), engine={"pace_ms": 300.0}) as cluster:
        model: Any = cluster.model
        stream = model.tokens(request(), Context("r1"))
        stream.elsewhere = elsewhere
        await stream.start()
        reading = asyncio.create_task(stream.read())
        await cluster.kill(await serving(cluster))
        with pytest.raises(Unavailable, match="the worker was lost"):
            async with asyncio.timeout(60):
                await reading


async def test_a_role_can_be_asked_by_itself() -> None:
    async with fleet(workers=0) as cluster:
        await cluster.add(engine=Use("sim", {"role": "prefill", "pace_ms": 1.0}), name="reader")
        await cluster.wait_ready(1)
        model: Any = cluster.catalog.offered()["sim"]
        with pytest.raises(Unavailable, match="a decode worker is missing"):
            model.tokens(request(), Context("r1"))
        stream = model.tokens(request(stops=Stops(max_tokens=1, ignore_eos=True)), Context("r1"), role="prefill")
        await stream.start()
        outputs = await stream.read()
        assert [output.transfer for output in outputs] == [{"tokens": len(PROMPT)}]
        assert model.roles() == ("aggregated", "aggregated")
        await cluster.add(engine=Use("sim", {"role": "decode", "pace_ms": 1.0}), name="writer")
        await cluster.wait_ready(2)
        assert model.roles() == ("prefill", "decode")


async def test_what_does_not_fit_is_refused_before_anybody_is_asked() -> None:
    async with fleet(workers=1, engine={"context_length": 80}) as cluster:
        model: Any = cluster.model
        with pytest.raises(RequestError, match="context length is 80"):
            model.tokens(request(), Context("r1"))


async def test_decisions_that_followed_are_asked_of_the_worker_that_made_them() -> None:
    async with fleet(workers=1) as cluster:
        asked: list[Any] = []

        async def explain(arguments: Any) -> Any:
            asked.append(arguments)
            return {"decisions": [{"id": "d7", "text": "because"}]}

        async def answer() -> str:
            generation = await cluster.generate(PROMPT, max_tokens=2)
            while await generation.read():
                pass
            return generation.decisions[-1]

        first = await answer()
        assert await cluster.catalog.further(first) == [], "this worker decides nothing"
        worker: Any = cluster.worker(0)
        worker.engine = Watched(worker.engine)
        worker.engine.controls = lambda: {"explain": explain}
        (member,) = cluster.catalog.offered()["sim"].members.values()
        member.card = msgspec.structs.replace(member.card, capabilities=("explain",))
        second = await answer()
        assert await cluster.catalog.further(second) == [{"id": "d7", "text": "because"}]
        assert asked == [{"id": cluster.catalog.decision(second)["request"]["id"]}]  # type: ignore[index]
        assert await cluster.catalog.further("nobody") == []
        worker.engine.controls = dict
        (said,) = await cluster.catalog.further(second)
        assert "is not to be had: this engine has no action 'explain'" in said["text"]
