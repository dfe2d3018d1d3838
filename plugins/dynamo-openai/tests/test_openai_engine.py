"""The engine and its server: how they meet, what a request becomes, and what trouble becomes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_asking import PROMPT, Worker, ask, request, until

from dynamo_core.config import Secret
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError, DynamoError, EngineDead, EngineFailed, RequestError, WorkerOverloaded
from dynamo_core.testing.servers import Authority, free_port
from dynamo_core.types import Guided, Hints, Sampling, Stops

# ------------------------------------------------------------------ how they meet


async def test_a_server_tells_all_that_a_card_needs(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(ranks=2, names=["big", "large"]) as server:
        engine = make_engine(server)
        card = await engine.start(EngineContext())
        await engine.stop()
    assert (card.name, card.aliases, card.context_length, card.block_size, card.total_blocks, card.dp_size) == ("big", ("large",), 512, 16, 1000, 2)
    assert (card.eos_token_ids, card.vocab_size, card.surfaces, card.kv_events) == ((wire.EOS,), wire.VOCABULARY, ("chat", "completions"), False)
    assert card.chat_template
    assert card.engine == f"vLLM 0.32.0 at {server.url}"
    assert card.runtime["url"] == server.url  # gateways that send requests themselves get it from a router


async def test_what_the_operator_says_counts_more(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(metrics=False, max_model_len=256, ranks=2) as server:
        engine = make_engine(server, block_size=64, total_blocks=7, dp_size=3, context_length=128)
        card = await engine.start(EngineContext())
        await engine.stop()
    assert (card.block_size, card.total_blocks, card.dp_size, card.context_length) == (64, 7, 3, 128)


async def test_a_server_that_is_not_up_yet_is_waited_for(wire: Any, make_engine: Callable[..., Any]) -> None:
    server, worker = wire.WireServer(port=free_port()), Worker()
    starting = asyncio.create_task(make_engine(server).start(worker.context))
    await until(lambda: worker.phases, "a phase")
    assert worker.phases[0].startswith(f"wait for {server.url} (")
    await server.start()
    assert (await asyncio.wait_for(starting, 20)).name == "wire"
    await server.stop()


async def test_what_the_machine_trusts_is_trusted_for_all_that_is_asked(
    wire: Any, make_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, tls = Authority(tmp_path), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*fleet.issue("server"))
    async with wire.serving(tls=tls) as server:
        worker = Worker()
        stranger = asyncio.create_task(make_engine(server).start(worker.context))
        await until(lambda: worker.phases, "refused")
        assert "CERTIFICATE_VERIFY_FAILED" in worker.phases[0]
        await ended(stranger)
        monkeypatch.setenv("SSL_CERT_FILE", str(fleet.cert))
        engine = make_engine(server)
        await engine.start(EngineContext())
        assert await ask(engine, request())
        await engine.stop()


async def test_a_server_that_is_full_when_its_worker_starts_is_waited_for(wire: Any, make_engine: Callable[..., Any]) -> None:
    worker = Worker()
    async with wire.serving(trouble={"status": 503, "body": "busy"}) as server:
        engine = make_engine(server)
        starting = asyncio.create_task(engine.start(worker.context))
        await until(lambda: any("at capacity: busy" in phase for phase in worker.phases), "told why")
        server.trouble = None
        assert (await asyncio.wait_for(starting, 20)).name == "wire"
        await engine.stop()


async def test_a_key_is_sent_and_a_wrong_one_is_told_to_the_operator(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(api_key="s3cret") as server:
        with pytest.raises(ConfigError, match="api_key") as refusal:
            await make_engine(server, api_key=Secret("wrong", "env:KEY")).start(EngineContext())
        assert "wrong" not in str(refusal.value)
        engine = make_engine(server, api_key=Secret("s3cret", "env:KEY"))
        assert "s3cret" not in repr(engine)
        await engine.start(EngineContext())
        assert len([token for output in await ask(engine, request()) for token in output.token_ids]) == 5
        await engine.stop()


@pytest.mark.parametrize(
    ("server_options", "options", "said"),
    [
        ({"names": ["a"]}, {"model": "b"}, "has no model 'b'\n  hint: it has: a"),
        ({"token_ids": False}, {}, "answers with text and not with token ids\n  hint: `return_token_ids`"),
        ({"trouble": {"status": 404, "body": {"detail": "Not Found"}}}, {}, "lists its models and does not generate"),
        ({"trouble": {"status": 400, "body": {"error": {"message": "prompt must be a string", "code": 400}}}}, {}, "does not generate from tokens: prompt must be a string"),
        ({}, {"tokenizer": "/no/such/folder"}, "there is no folder '/no/such/folder'"),
        ({}, {"tokenizer": None}, "its model is at '/models/wire', and there is no such folder here\n  hint: set `tokenizer`"),
        ({"metrics": False}, {"kv_events": "tcp://127.0.0.1:1"}, "does not say how many tokens a block of its KV cache has"),
    ],
)
async def test_what_cannot_work_is_told_at_start_with_a_remedy(wire: Any, make_engine: Callable[..., Any], server_options: Any, options: Any, said: str) -> None:
    async with wire.serving(**server_options) as server:
        with pytest.raises(ConfigError) as problem:
            await asyncio.wait_for(make_engine(server, **options).start(EngineContext()), 20)
    assert said in str(problem.value)


@pytest.mark.parametrize("role", ["prefill", "decode", "encode"])
async def test_a_role_that_a_plain_server_cannot_have_is_refused(make_engine: Callable[..., Any], wire: Any, role: str) -> None:
    with pytest.raises(ConfigError, match=f"role = '{role}'.*cannot hand KV blocks over"):
        await make_engine(wire.WireServer(port=1)).start(EngineContext(role=role))


async def test_a_server_that_is_none_is_told_from_one_that_is_not_there(make_engine: Callable[..., Any]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        class There:
            url = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"

        with pytest.raises(ConfigError, match="no OpenAI-compatible server"):
            await asyncio.wait_for(make_engine(There).start(EngineContext()), 20)


# ------------------------------------------------------------------ what a request becomes


async def test_every_field_has_its_name_at_the_server(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(ranks=2, adapters=["sql"]) as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, frequency_penalty=0.1, presence_penalty=0.2, repetition_penalty=1.1,
                            logit_bias={5: -1.5}, n=2)  # fmt: skip
        await ask(engine, request(sampling=sampling, stops=Stops(max_tokens=9, min_tokens=2, stop_token_ids=(7, 8)), logprobs=2, cache_salt="tenant", adapter="sql",
                                  hints=Hints(priority=3, dp_rank=1), extra={"openai": {"bad_words": ["no"]}}))  # fmt: skip
        headers, body = server.seen[-1]
        await ask(engine, request(guided=Guided(choice=("yes", "no")), stops=Stops(max_tokens=9)))
        assert server.seen[-1][1]["structured_outputs"] == {"choice": ["yes", "no"]}
        bare = server.seen[-1][1]
        await engine.stop()
    assert body.pop("request_id").startswith("r-")
    assert body == {
        "model": "sql", "prompt": PROMPT, "max_tokens": 9, "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}, "bad_words": ["no"],
        "logprobs": 2, "return_tokens_as_token_ids": True, "min_tokens": 2, "stop_token_ids": [7, 8], "logit_bias": {"5": -1.5}, "cache_salt": "tenant",
        "priority": -3, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "frequency_penalty": 0.1, "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    assert headers["x-data-parallel-rank"] == "1"
    assert headers["traceparent"] == "00-aa-bb-01"
    assert "top_p" not in bare, "what a request leaves open is the server's to say"


async def test_a_server_without_priorities_is_not_sent_any(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(priorities=False) as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        await ask(engine, request(hints=Hints(priority=3)))
        await engine.stop()
    assert "priority" not in server.seen[-1][1]


@pytest.mark.parametrize(
    "more",
    [{"extra": {"openai": {"temperature": 2}}}, {"hints": Hints(dp_rank=7)}, {"guided": Guided(json_object=True), "resumed": 2}, {"adapter": "none"}],
    ids=["extra", "rank", "guided-resumed", "adapter"],
)
async def test_what_the_server_cannot_do_is_refused_before_it_is_sent(wire: Any, make_engine: Callable[..., Any], more: Any) -> None:
    async with wire.serving(ranks=2, adapters=["sql"]) as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        sent = len(server.seen)
        with pytest.raises(RequestError):
            await ask(engine, request(**more))
        assert len(server.seen) == sent
        await engine.stop()


async def test_cached_tokens_come_with_the_last_output_and_not_from_servers_that_do_not_count(wire: Any, make_engine: Callable[..., Any]) -> None:
    for details, expected in ((True, 64), (False, None)):
        async with wire.serving(details=details) as server:
            engine = make_engine(server)
            await engine.start(EngineContext())
            await ask(engine, request())
            outputs = await ask(engine, request())
            await engine.stop()
        assert outputs[-1].cached_tokens == expected
        assert outputs[-1].finish_reason == "length"


async def test_closing_the_iterator_hangs_up(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(step=0.01) as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        outputs = engine.generate(request(400), Context("r"))
        await anext(outputs)
        await outputs.aclose()
        await until(lambda: server.running == 0 and server.hung_up == 1, "hung up")
        await engine.stop()


async def test_requests_one_after_the_other_share_a_connection(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving() as server:
        engine = make_engine(server, poll_interval=60)
        await engine.start(EngineContext())
        before = len(server._tasks)
        for _ in range(5):
            await ask(engine, request())
        assert len(server._tasks) == before
        for task in list(server._tasks):
            task.cancel()  # the server closes what is idle
        await until(lambda: not server._tasks, "closed")
        await ask(engine, request())
        await engine.stop()


# ------------------------------------------------------------------ what trouble becomes


@pytest.mark.parametrize(
    ("trouble", "error", "said"),
    [
        ({"status": 400, "body": {"error": {"message": "no such thing", "param": "top_k", "code": 400}}}, RequestError, "no such thing"),
        ({"status": 429, "body": {"error": {"message": "slow down"}}}, WorkerOverloaded, "slow down"),
        ({"status": 503, "body": "<html>busy</html>"}, WorkerOverloaded, "busy"),
        ({"status": 502, "body": ""}, EngineDead, "dead"),
        ({"status": 404, "body": {"error": {"message": "The model `wire` does not exist."}}}, EngineDead, "does not exist"),
        ({"status": 401, "body": {"error": "Unauthorized"}}, EngineDead, "api_key"),
        ({"status": 500, "body": {"error": {"message": "EngineCore encountered an issue.", "code": 500}}}, EngineDead, "EngineCore"),
        ({"status": 500, "body": {"error": {"message": "oops"}}}, EngineFailed, "oops"),
        ({"after": 2, "error": {"message": "bad grammar", "code": 400}}, RequestError, "bad grammar"),
        ({"after": 2, "error": {"message": "EngineCore encountered an issue.", "code": 500}}, EngineDead, "EngineCore"),
        ({"after": 2, "finish": "abort"}, EngineDead, "aborted"),
        ({"after": 2, "finish": "weird"}, EngineFailed, "weird"),
        ({"after": 2, "cut": True}, EngineDead, "broke the stream"),
    ],
)  # fmt: skip
async def test_trouble_has_its_name_and_the_next_request_is_served(wire: Any, make_engine: Callable[..., Any], trouble: Any, error: type[DynamoError], said: str) -> None:
    async with wire.serving() as server:
        engine = make_engine(server, poll_interval=60)
        await engine.start(EngineContext())
        server.trouble = trouble
        with pytest.raises(error, match=said):
            await ask(engine, request())
        server.trouble = None
        assert await ask(engine, request())
        await engine.stop()


async def test_a_stream_that_falls_silent_ends_with_stop(wire: Any, make_engine: Callable[..., Any]) -> None:
    async with wire.serving(trouble=None) as server:
        engine = make_engine(server)
        await engine.start(EngineContext())
        server.trouble = {"after": 2, "silence": True}
        asking = asyncio.create_task(ask(engine, request()))
        await until(lambda: server.running, "asked")
        await asyncio.sleep(0.05)
        await engine.stop()
        with pytest.raises(EngineDead, match="was stopped"):
            await asking
