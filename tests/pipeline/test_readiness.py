"""When a model is served, what the error says until then, and what plugins hear of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from dynamo_core.config.schema import Use
from dynamo_core.context import Context
from dynamo_core.errors import ModelNotFound, PromptTooLong, Unavailable
from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.testing.cluster import Cluster, read_all


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_empty_fleet_is_unavailable_and_not_unknown() -> None:
    async with Cluster.up(workers=0) as cluster:
        with pytest.raises(Unavailable, match="no model is registered in namespace 'dynamo' yet"):
            cluster.catalog.get("anything")
        assert cluster.catalog.models() == []


async def test_a_model_whose_canary_is_on_its_way_is_starting_and_not_listed() -> None:
    async with Cluster.up(workers=0) as cluster:
        number = await cluster.add()
        gate = asyncio.Event()
        worker = cluster.worker(number)

        async def slow(payload: bytes, context: Context) -> AsyncIterator[bytes]:
            await gate.wait()
            yield b"ok"

        worker.runtime._endpoints[f"dynamo.backend.{names.PROBE}"] = slow
        await worker.withdraw()
        await until(lambda: not cluster.catalog._announced)
        await worker._announce()
        await until(lambda: cluster.catalog.status()["models"].get("echo", {}).get("workers"))
        assert cluster.catalog.models() == []
        with pytest.raises(Unavailable, match="1 of 1 workers of model 'echo' have not answered their canary yet"):
            cluster.catalog.get("echo")
        gate.set()
        await cluster.wait_ready(1)
        assert [model.name for model in cluster.catalog.models()] == ["echo"]
        with pytest.raises(ModelNotFound, match="models: echo"):
            cluster.catalog.get("gpt-17")


async def test_a_worker_that_disagrees_is_refused_by_name_and_admitted_when_the_others_are_gone() -> None:
    async with Cluster.up(workers=1) as cluster:
        number = await cluster.add()
        other = cluster.worker(number)
        await cluster.wait_ready(2)
        await other.withdraw()
        assert other.card is not None
        other.card = msgspec.structs.replace(other.card, chat_template="{{ 'something else' }}")
        await other._announce()
        label = other.runtime.instance("backend", names.GENERATE).label
        await until(lambda: any(label in why and "another tokenizer, template or block size" in why for why in cluster.catalog.problems().values()))
        await read_all(await cluster.generate("hello", max_tokens=3))
        await cluster.drain(0)
        await cluster.wait_ready(1)
        assert not any(label in why for why in cluster.catalog.problems().values())
        assert cluster.model.card.chat_template == "{{ 'something else' }}"


async def test_a_name_that_is_also_an_alias_is_that_of_the_model_itself_and_either_may_leave() -> None:
    async with Cluster.up(workers=1) as cluster:
        first = cluster.worker(0)
        await first.withdraw()
        await until(lambda: not cluster.catalog.models())
        cluster.catalog._models.clear()
        assert first.card is not None
        first.card = msgspec.structs.replace(first.card, aliases=("parrot", "bird"))
        await first._announce()
        await cluster.wait_ready(1)
        assert [cluster.catalog.get(name).name for name in ("echo", "parrot", "bird")] == ["echo"] * 3
        second = cluster.worker(await cluster.add(served_name="parrot"))
        await until(lambda: len(cluster.catalog.models()) == 2)
        assert cluster.catalog.get("parrot").name == "parrot"
        await second.withdraw()
        await until(lambda: len(cluster.catalog.models()) == 1)
        assert cluster.catalog.get("parrot").name == "echo"
        await first.withdraw()
        await second._announce()
        await until(lambda: [model.name for model in cluster.catalog.models()] == ["parrot"])
        assert cluster.catalog.get("parrot").name == "parrot"
        with pytest.raises(Unavailable, match="no worker of model 'echo' is registered"):
            cluster.catalog.get("bird")


async def test_a_worker_without_a_tokenizer_is_named_and_its_model_is_starting() -> None:
    async with Cluster.up(workers=1) as cluster:
        other = cluster.worker(await cluster.add(served_name="bare"))
        await cluster.wait_ready(2)
        await other.withdraw()
        assert other.card is not None
        other.card = msgspec.structs.replace(other.card, tokenizer=None)
        await until(lambda: not cluster.catalog._models["bare"].members)
        cluster.catalog._models.pop("bare")
        await other._announce()
        await until(lambda: any("names no tokenizer" in why for why in cluster.catalog.problems().values()))
        with pytest.raises(Unavailable, match=r"model 'bare' is starting here: .* names no tokenizer"):
            cluster.catalog.get("bare")


async def test_a_model_that_needs_another_role_waits_for_it() -> None:
    async with Cluster.up(workers=0) as cluster:
        worker = cluster.worker(await cluster.add())
        await worker.withdraw()
        assert worker.card is not None
        worker.card = msgspec.structs.replace(worker.card, needs=(("encode",),))
        await worker._announce()
        await until(lambda: any(w["proven"] for m in cluster.catalog.status()["models"].values() for w in m["workers"]))
        with pytest.raises(Unavailable, match="they need encode workers beside them"):
            cluster.catalog.get("echo")
        await cluster.add(role="encode", name="encoder")
        await until(lambda: cluster.catalog.models())


async def test_a_record_that_nobody_understands_is_named_and_skipped() -> None:
    async with Cluster.up(workers=1) as cluster:
        runtime = cluster.worker(0).runtime
        key = "v1/instances/dynamo/backend/generate/00000000deadbeef"
        await runtime.discovery.put(key, b"\xff\x00 not json", runtime.lease)
        await until(lambda: key in cluster.catalog.problems())
        assert (await read_all(await cluster.generate("still here", max_tokens=5)))[0] == "still"
        await runtime.discovery.delete(key)
        await until(lambda: not cluster.catalog.problems())


class Listener:
    """A plugin that hears of everything, and one hook of which is broken."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    @hookimpl
    def dynamo_worker_joined(self, instance: Any, card: Any) -> None:
        self.heard.append(("joined", card.name))

    @hookimpl
    def dynamo_worker_left(self, instance: Any, reason: str) -> None:
        self.heard.append(("left", reason))

    @hookimpl
    def dynamo_decision(self, decision: Any) -> None:
        self.heard.append(("decision", decision.id))


class Broken:
    @hookimpl
    def dynamo_decision(self, decision: Any) -> None:
        raise ZeroDivisionError("oops")


async def test_observer_hooks_hear_of_the_fleet_and_one_that_raises_is_logged_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    plugins = Plugins.load()
    listener = Listener()
    plugins.manager.register(Broken(), name="acme-broken")
    plugins.manager.register(listener, name="acme-listener")
    with caplog.at_level(logging.ERROR):
        async with Cluster.up(workers=2, plugins=plugins) as cluster:
            for _ in range(3):
                await read_all(await cluster.generate("hi", max_tokens=1))
            await cluster.drain(0)
            await until(lambda: ("left", "left") in listener.heard)
    kinds = [kind for kind, _ in listener.heard]
    assert kinds.count("joined") == 2
    assert kinds.count("decision") == 3
    assert kinds.index("joined") < kinds.index("decision") < kinds.index("left")
    assert [r.getMessage() for r in caplog.records if "acme-broken" in r.getMessage()] == ["dynamo_decision of plugin acme-broken failed; it is logged once"]


async def test_a_model_has_the_context_of_its_shortest_worker_as_workers_come_and_go() -> None:
    async with Cluster.up(workers=1, engine=Use("echo", {"context_length": 64})) as cluster:
        def length() -> int:
            return cluster.catalog.get("echo").card.context_length

        async def fits(prompt: str) -> bool:
            try:
                await cluster.catalog.get("echo").preprocessor.encode(prompt, add_special_tokens=False)
            except PromptTooLong:
                return False
            return True

        assert (length(), await fits("a" * 5000)) == (64, False)
        await cluster.add(engine=Use("echo", {"context_length": 8192}))
        await cluster.wait_ready(2)
        assert length() == 64
        await cluster.worker(0).withdraw()
        await until(lambda: length() == 8192)
        assert await fits("a" * 5000)
        await cluster.add(engine=Use("echo", {"context_length": 128}))
        await until(lambda: length() == 128)
        assert not await fits("a" * 5000)
