"""The server of the quick tests answers as the real one does: the same statuses, the same fields, the same kinds of values."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from dynamo_core.testing.servers import free_port

pytestmark = pytest.mark.slow

PROMPT = [72, 101, 108, 108, 111, 33]
BASE = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
STREAM = {**BASE, "stream": True, "stream_options": {"include_usage": True}}
CASES: dict[str, dict[str, Any]] = {
    "whole": BASE,
    "stream": STREAM,
    "choices": {**STREAM, "n": 2, "temperature": 1, "seed": 3},
    "logprobs": {**STREAM, "logprobs": 2, "return_tokens_as_token_ids": True},
    "prompt-logprobs": {**BASE, "prompt_logprobs": 1},
    "choice": {**STREAM, "ignore_eos": False, "max_tokens": 20, "structured_outputs": {"choice": ["yes", "yes"]}},
    "no-usage": {**BASE, "stream": True},
    "unknown-model": {**BASE, "model": "nope"},
    "bad-temperature": {**STREAM, "temperature": -1},
    "no-prompt": {**BASE, "prompt": []},
    "streamed-prompt-logprobs": {**STREAM, "prompt_logprobs": 1},
}


@pytest.fixture
async def wired(wire: Any) -> AsyncIterator[Any]:
    async with wire.serving(kv=(free_port(), free_port())) as server:
        yield server


async def asked(url: str, model: str, case: dict[str, Any]) -> tuple[int, list[Any]]:
    """Status, and the shape of each event or of the body."""
    async with httpx.AsyncClient(timeout=120) as client:
        answer = await client.post(f"{url}/v1/completions", json={"model": model, **case})
    if answer.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return answer.status_code, sorted({json.dumps(shape(json.loads(event))) for event in events[:-1]})
    return answer.status_code, [json.dumps(shape(answer.json()))]


def shape(value: Any, key: str = "") -> Any:
    """Names of fields and kinds of values. What is data under a name of its own, such as tokens, counts by its kind."""
    if isinstance(value, dict):
        if key in ("top_logprobs", "prompt_logprobs"):
            return {"*": shape(next(iter(value.values())))} if value else {}
        return {name: shape(value[name], name) for name in sorted(value)}
    if isinstance(value, list):
        return [shape(value[-1], key)] if value else []
    if isinstance(value, bool) or value is None:
        return value
    return "number" if isinstance(value, int | float) else "text"


@pytest.mark.parametrize("name", CASES)
async def test_completions_are_alike(wired: Any, vllm_servers: Any, name: str) -> None:
    (status, ours), (other, theirs) = [await asked(server.url, model, CASES[name]) for server, model in ((wired, "wire"), (vllm_servers[0], "tiny"))]
    assert status == other
    assert set(theirs) <= set(ours), "vLLM says what the other does not"  # it may leave out an event between the first and the last, by merging them
    assert len(set(ours) - set(theirs)) <= 1, "the other says what vLLM does not"


@pytest.mark.parametrize("path", ["/v1/models", "/version", "/kv_event_sources"])
async def test_what_servers_say_of_themselves_is_alike(wired: Any, vllm_servers: Any, path: str) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        ours, theirs = [(await client.get(f"{server.url}{path}")).json() for server in (wired, vllm_servers[0])]
    assert shape(ours) == shape(theirs)


async def test_metrics_have_the_same_series(wired: Any, vllm_servers: Any) -> None:
    from dynamo_openai.server import cache_of, loads_of

    async with httpx.AsyncClient(timeout=60) as client:
        for server, blocks in ((wired, 16), (vllm_servers[0], 32)):
            page = (await client.get(f"{server.url}/metrics")).text
            cache = cache_of(page)
            assert (cache.block_size, cache.prefixes, cache.ranks) == (blocks, True, 1)
            assert (cache.total_blocks or 0) > 100
            assert [load.dp_rank for load in loads_of(page, 100)] == [0]
