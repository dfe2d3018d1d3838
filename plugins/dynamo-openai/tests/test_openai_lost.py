"""How a server is lost and found, and what is seen of it while it is there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from openai_asking import PROMPT, Worker, ask, request, until

from dynamo_core.cards import ModelCard
from dynamo_core.contracts.engine_answers import replay_kv_events
from dynamo_core.engines import BlocksCleared, EngineContext
from dynamo_core.errors import EngineDead, RequestError
from dynamo_core.testing.servers import free_port


async def test_a_lost_server_leaves_discovery_and_returns_when_it_answers_again(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(step=0.01) as server:
        engine = make_engine(server)
        card = await engine.start(worker.context)
        asking = asyncio.create_task(ask(engine, request(400)))
        await until(lambda: server.running, "asked")
        await server.stop()
        with pytest.raises(EngineDead, match="broke the stream"):
            await asking
        await until(lambda: worker.offers == [[]], "withdrawn")
        with pytest.raises(EngineDead):
            await engine.probe()
        assert "server" in engine.problems()
        await server.start()
        await until(lambda: worker.offers == [[], [card]], "offered again")
        await engine.probe()
        assert await ask(engine, request())
        assert engine.problems() == {}
        await engine.stop()


async def test_a_probe_finds_the_server_before_the_next_look(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving() as server:
        engine = make_engine(server, poll_interval=60)
        await engine.start(worker.context)
        await server.stop()
        with pytest.raises(EngineDead):
            await engine.probe()
        with pytest.raises(EngineDead):
            await ask(engine, request())
        await until(lambda: worker.offers == [[]], "withdrawn")
        await server.start()
        await engine.probe()
        assert await ask(engine, request())
        await engine.stop()


@pytest.mark.parametrize(
    ("change", "said"),
    [({"max_model_len": 64}, "now serves '/models/wire' with 64 tokens"), ({"root": "/models/other"}, "now serves '/models/other'"), ({"names": ["other"]}, "no longer serves 'wire'")],
)
async def test_a_server_that_returns_as_another_one_ends_its_worker_so_that_the_next_meets_it_anew(
    wire: Any, make_engine: Callable[..., Any], change: dict[str, Any], said: str
) -> None:
    worker = Worker()
    async with wire.serving() as server:
        engine = make_engine(server)
        await engine.start(worker.context)
        await server.stop()
        await until(engine.problems, "lost")
        for name, value in change.items():
            setattr(server, name, value)
        await server.start()
        await until(lambda: worker.deaths, "told apart")
        assert said in worker.deaths[0]
        with pytest.raises(EngineDead, match=re.escape(said)):
            await ask(engine, request())
        await engine.stop()


async def test_a_server_that_is_back_with_another_key_says_so(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving() as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        server.api_key = "s3cret"
        await until(engine.problems, "refused")
        assert engine.problems()["server"].startswith(f"{server.url} refuses to say which models it has (401)")
        server.api_key = None
        await until(lambda: not engine.problems(), "found")
        await engine.stop()


@pytest.mark.parametrize(("names", "options"), [(["wire", "other"], {"model": "wire"}), (["wire"], {})], ids=["another-is-there", "none-is-there"])
async def test_a_model_that_the_operator_named_is_waited_for_and_so_is_any(
    wire: Any, make_engine: Callable[..., Any], names: list[str], options: dict[str, str]
) -> None:
    worker = Worker()
    async with wire.serving(names=names, metrics=False) as server:
        engine = make_engine(server, **options)
        await engine.start(worker.context)
        server.names.remove("wire")
        await until(lambda: "no longer serves 'wire'" in engine.problems().get("server", ""), "missed")
        server.names.append("wire")
        await until(lambda: not engine.problems(), "found")
        assert not worker.deaths
        await engine.stop()


async def test_adapters_are_models_of_their_own_as_long_as_the_server_has_them(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(adapters=["sql"]) as server:
        engine = make_engine(server)
        card = await engine.start(worker.context)
        assert "lora" in card.capabilities
        assert [(offered.name, offered.adapter) for offered in worker.offers[-1]] == [("wire", None), ("sql", "sql")]
        assert await ask(engine, request(adapter="sql")) != await ask(engine, request())
        server.adapters.clear()
        await until(lambda: [offered.name for offered in worker.offers[-1]] == ["wire"], "gone")
        with pytest.raises(RequestError):
            await ask(engine, request(adapter="sql"))
        await engine.stop()


async def test_adapters_are_found_whichever_of_its_names_the_base_model_is_served_by(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(names=["big", "large"], adapters=["sql"]) as server:
        engine = make_engine(server, model="large")
        await engine.start(worker.context)
        assert [offered.name for offered in worker.offers[-1]] == ["large", "sql"]
        await engine.stop()


async def test_load_is_told_for_each_rank(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(ranks=2, step=0.01) as server:
        engine = make_engine(server, poll_interval=0.02)
        await engine.start(worker.context)
        asking = asyncio.create_task(ask(engine, request(200)))
        await until(lambda: any(load.running == 1 and load.kv_used_blocks == 10 and load.kv_total_blocks == 1000 for load in worker.loads), "busy")
        assert {load.dp_rank for load in worker.loads} == {0, 1}
        asking.cancel()
        await until(lambda: worker.loads[-2].running == 0, "idle")
        await engine.stop()


async def test_kv_events_are_followed_without_a_word_from_the_operator_and_forgotten_with_the_server(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(kv=(free_port(), free_port())) as server:
        engine = make_engine(server)
        card = await engine.start(worker.context)
        assert card.kv_events
        await ask(engine, request(prompt=PROMPT))
        await ask(engine, request(prompt=[*PROMPT, *PROMPT], cache_salt="tenant"))
        await until(lambda: len(worker.events) == 2, "told")
        assert PROMPT[:64] in replay_kv_events(worker.events, card.block_size)
        assert [getattr(event, "cache_salt", None) for event in worker.events] == [None, "tenant"]
        await server.stop()
        await until(engine.problems, "lost")
        await server.start()
        await until(lambda: BlocksCleared() in worker.events, "forgotten")
        await until(lambda: not engine.problems(), "back")
        await ask(engine, request(prompt=PROMPT))
        await until(lambda: worker.events[-1] != BlocksCleared(), "told again")
        assert PROMPT[:64] in replay_kv_events(worker.events[worker.events.index(BlocksCleared()) :], card.block_size)
        await engine.stop()


async def test_kv_events_can_be_left_alone(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(kv=(free_port(), free_port())) as server:
        engine = make_engine(server, kv_events="off")
        assert not (await engine.start(EngineContext())).kv_events
        await engine.stop()


async def test_the_card_survives_the_wire(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving() as server:
        engine = make_engine(server)
        card = await engine.start(EngineContext())
        await engine.stop()
    assert msgspec.json.decode(msgspec.json.encode(card), type=ModelCard) == card
