"""The OpenAI SDK, unmodified, against a stack of real processes."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "say it again"}]


@pytest.fixture
def client(echo_stack):
    with OpenAI(base_url=f"{echo_stack.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_chat_answer_arrives_whole(client) -> None:
    answer = client.chat.completions.create(model="echo", messages=QUESTION, max_tokens=12)
    assert answer.choices[0].message.content == "user\nsay it "
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_a_streamed_answer_equals_the_whole_one(client) -> None:
    whole = client.chat.completions.create(model="echo", messages=QUESTION, max_tokens=20)
    stream = client.chat.completions.create(model="echo", messages=QUESTION, max_tokens=20, stream=True, stream_options={"include_usage": True})
    events = list(stream)
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == whole.choices[0].message.content
    assert [e.usage for e in events if e.usage][-1].completion_tokens == 20
    assert events[0].choices[0].delta.role == "assistant"


def test_plain_completions_take_text_and_tokens(client) -> None:
    text = client.completions.create(model="echo", prompt="abc", max_tokens=6)
    tokens = client.completions.create(model="echo", prompt=[97, 98, 99], max_tokens=6)
    assert text.choices[0].text == tokens.choices[0].text == "abcabc"


async def test_the_async_client_streams_many_at_once(echo_stack) -> None:
    import asyncio

    async with AsyncOpenAI(base_url=f"{echo_stack.url}/v1", api_key="unused", max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model="echo", prompt=f"<{i:04}>", max_tokens=12, stream=True)
            return "".join([event.choices[0].text async for event in stream])

        assert await asyncio.gather(*(one(i) for i in range(100))) == [f"<{i:04}>" * 2 for i in range(100)]


def test_models_are_listed_and_found(client) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"


def test_mistakes_become_the_errors_of_the_sdk(client) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-17", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temprature"):
        client.chat.completions.create(model="echo", messages=QUESTION, extra_body={"temprature": 1})
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="echo", prompt="x" * 9000)


def test_a_decision_is_explained_by_its_header_and_by_the_request_id(echo_stack, client) -> None:
    raw = client.chat.completions.with_raw_response.create(model="echo", messages=QUESTION, max_tokens=3, extra_headers={"x-request-id": "why-there"})
    record = httpx.get(f"{echo_stack.url}/debug/decisions/{raw.headers['x-dynamo-decision']}").json()
    assert record["outcome"] == "done"
    assert "turn" in record["text"]
    assert httpx.get(f"{echo_stack.url}/debug/decisions/why-there").json()["id"] == record["id"]


def test_both_workers_take_part(echo_stack, client) -> None:
    workers = {client.chat.completions.with_raw_response.create(model="echo", messages=QUESTION, max_tokens=1).headers["x-dynamo-decision"] for _ in range(4)}
    served = {httpx.get(f"{echo_stack.url}/debug/decisions/{decision}").json()["text"].split("served by  ")[1].split(",")[0] for decision in workers}
    assert len(served) == 2


def test_every_role_has_health_and_metrics(echo_stack) -> None:
    fleet = httpx.get(f"{echo_stack.url}/debug/fleet").json()
    assert fleet["models"]["echo"]["ready"] is True
    assert httpx.get(f"{echo_stack.url}/ready").status_code == 200
    assert "dynamo_frontend_requests_total" in httpx.get(f"{echo_stack.url}/metrics").text
