"""The client library that most users have, as it is."""

from __future__ import annotations

import asyncio

import openai
import pytest
from fake_catalog import logprob

from dynamo_core.types import Delta

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_the_async_client(each):
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{each.port}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(model="m", messages=MESSAGES)
        assert whole.choices[0].message.content == "Hello, world"
        assert whole.usage.total_tokens == 11
        parts = [
            chunk async for chunk in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True})
        ]
        assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == "Hello, world"
        assert parts[-1].usage.completion_tokens == 3
        async with client.chat.completions.stream(model="m", messages=MESSAGES) as stream:
            assert (await stream.get_final_completion()).choices[0].message.content == "Hello, world"
        assert (await client.completions.create(model="m", prompt=["a", "b"])).choices[1].text == "Hello, world"
        assert [model.id async for model in await client.models.list()] == ["m", "org/name/with-slashes"]
        assert (await client.models.retrieve("m")).created == 1_700_000_000


async def test_the_sync_client(each):
    def use() -> None:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{each.port}/v1", api_key="none", max_retries=0) as client:
            assert client.chat.completions.create(model="m", messages=MESSAGES).choices[0].finish_reason == "stop"
            stream = client.chat.completions.create(model="m", messages=MESSAGES, stream=True, extra_body={"dynamo": {"annotations": ["worker"]}})
            chunks = list(stream)
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello, world"
            assert chunks[-1].model_extra["dynamo"] == {"worker": ["backend-000001"]}
            raw = client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
            assert raw.headers["x-dynamo-decision"]
            assert "".join(c.choices[0].text for c in client.completions.create(model="m", prompt="a", stream=True)) == "Hello, world"

    await asyncio.to_thread(use)


async def test_logprobs_and_choices_parse(site):
    site.model.script = [Delta(text="a", token_ids=[1], logprobs=[logprob("a", 1)]), Delta(finish_reason="length")]
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="none", max_retries=0) as client:
        answer = await client.chat.completions.create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=1)
        assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "a"
        legacy = await client.completions.create(model="m", prompt="x", logprobs=1)
        assert legacy.choices[0].logprobs.text_offset == [0]


async def test_errors_arrive_as_the_clients_own_classes(each):
    from dynamo_core import errors

    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{each.port}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="m", messages=MESSAGES, temperature=5)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="none", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        each.model.start_error = errors.RateLimited("slower")
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="m", messages=MESSAGES)
        each.model.start_error = None
        each.model.script = [Delta(text="a", token_ids=[1]), errors.EngineDead("the engine died")]
        with pytest.raises(openai.APIError, match="the engine died"):
            async for _ in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
                pass


async def test_closing_a_stream_early_cancels_the_generation(each):
    each.model.script = [Delta(text="a", token_ids=[1]), asyncio.Event()]
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{each.port}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        await anext(stream.__aiter__())
        await stream.close()
    await asyncio.wait_for(each.model.generations[0].cancel_event.wait(), 20)
