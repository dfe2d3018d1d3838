"""A model that sees, through the real frontend: images decide the answer, which is that of vLLM's own `LLM`, and share no cache."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Router, Use
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.testing.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

LONG = "The quick brown fox jumps over the lazy dog. " * 4
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(seeing: Path, seeing_args: dict[str, Any]) -> AsyncIterator[Cluster]:
    use = Use("vllm", {"model": str(seeing), "args": seeing_args, "start_method": "fork"})
    async with Cluster.up(workers=0, engine=use, router=Router(use=Use("kv"))) as cluster:
        await cluster.add()
        await cluster.wait_ready(1, timeout=120)
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(cluster.config.frontend, cluster.catalog, metrics=HttpMetrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120) as client:
        yield client


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_answers_to_images_are_those_of_vllms_own_generate(
    cluster: Cluster, client: httpx.AsyncClient, seeing: Path, seeing_args: dict[str, Any], image: Any, image_body: Any
) -> None:
    from vllm import LLM, SamplingParams

    assert cluster.model.card.image_placeholder == "<image>"
    assert "media" in cluster.model.card.capabilities
    cases = [(RED,), (BLUE,), (RED, BLUE), (BLUE, RED), ()]
    said = [(await ask(client, image_body(*colors)))["dynamo"] for colors in cases]
    llm = LLM(str(seeing), enforce_eager=True, disable_log_stats=True, **seeing_args)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    for colors, ours in zip(cases, said, strict=True):
        prompt: Any = {"prompt_token_ids": ours["prompt_token_ids"][0]} | ({"multi_modal_data": {"image": [image(c) for c in colors]}} if colors else {})
        (theirs,) = llm.generate(prompt, params, use_tqdm=False)
        assert ours["token_ids"][0] == list(theirs.outputs[0].token_ids)
    assert len({tuple(ours["token_ids"][0]) for ours in said}) == len(cases)


async def test_the_openai_client_sends_images_and_streams_the_answer(client: httpx.AsyncClient, image_body: Any) -> None:
    import openai

    ai = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=client)
    asked = image_body(RED)
    stream = await ai.chat.completions.create(model="seeing", messages=asked["messages"], max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True})
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    assert text == (await ask(client, image_body(RED)))["choices"][0]["message"]["content"]


async def test_equal_images_share_the_cache_and_different_ones_only_what_stands_before_them(client: httpx.AsyncClient, image_body: Any) -> None:
    def cached(said: dict[str, Any]) -> int:
        return (said["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)

    tail = " and so on" * 40
    green, white = (0, 255, 0), (255, 255, 255)
    async def with_tail(color: tuple[int, int, int]) -> int:
        asked = image_body(color, text=LONG)
        asked["messages"][0]["content"].append({"type": "text", "text": tail})
        return cached((await client.post("/v1/chat/completions", json=asked)).json())

    assert await with_tail(green) == 0
    again, other = await with_tail(green), await with_tail(white)
    assert again > other > 0


async def test_the_router_predicts_what_vllm_then_finds_in_its_cache_after_images_too(client: httpx.AsyncClient, image_body: Any) -> None:
    """As in a conversation: the second turn begins with the first one's images, which the frontend has learned to count by then."""

    def turn(more: str) -> dict[str, Any]:
        asked = image_body((9, 9, 9), (90, 9, 9), text=LONG)
        asked["messages"][0]["content"].append({"type": "text", "text": " and so on" * 30 + more})
        return asked

    first = await ask(client, turn(""))
    asked = turn(" What else?" * 12)

    async def predicted() -> int:
        record = (await ask(client, {**asked, "dynamo": {"dry_run": True}}))["record"]
        return int(record["columns"]["kv.overlap_tokens"]["values"][0])

    cacheable = first["usage"]["prompt_tokens"] // 32 * 32
    async with asyncio.timeout(30):
        while await predicted() < cacheable - 32:  # the last block has the first turn's end of message in it
            await asyncio.sleep(0.05)
    expected = await predicted()
    second = await ask(client, asked)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == expected > 128
    lengths = [len(said["dynamo"]["prompt_token_ids"][0]) for said in (first, second)]
    more = [said["usage"]["prompt_tokens"] - length for said, length in zip((first, second), lengths, strict=True)]
    assert more[0] == more[1] > 0, "usage counts the tokens of images, the first time and when they are known"


async def test_what_cannot_be_seen_is_refused_and_the_engine_goes_on(client: httpx.AsyncClient, image_body: Any) -> None:
    broken = image_body(RED)
    broken["messages"][0]["content"][1]["image_url"]["url"] = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nbroken").decode()
    answer = await client.post("/v1/chat/completions", json=broken)
    assert (answer.status_code, "cannot be decoded" in answer.text) == (400, True), answer.text
    forged = await client.post("/v1/chat/completions", json=image_body(RED, text="<image> is an image"))
    assert forged.status_code == 400
    assert "2 places for 1 images" in forged.text
    assert len((await ask(client, image_body(RED)))["dynamo"]["token_ids"][0]) == 8
