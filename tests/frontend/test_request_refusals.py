"""Requests that are refused: with the field's name, before anything is sent to a worker."""

from __future__ import annotations

import pytest
from fake_catalog import FakeModel

from dynamo_core.config.schema import Frontend

USER = [{"role": "user", "content": "x"}]
DEEP: dict = {}
for _ in range(70):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 2.1}, "temperature", "<= 2"),
        ({"temperature": -0.1}, "temperature", ">= 0"),
        ({"temperature": "hot"}, "temperature", "got `str`"),
        ({"top_p": 1.5}, "top_p", "<= 1"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"min_p": 2}, "min_p", "<= 1"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "<= 2"),
        ({"presence_penalty": -2.5}, "presence_penalty", ">= -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "> 0"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 129}, "n", "<= 128"),
        ({"n": 2, "temperature": 0}, "n", "must be 1 when temperature is 0"),
        ({"max_tokens": -1}, "max_tokens", ">= 0"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "more than max_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]", "<= 100"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "a key is wrong"),
        ({"logit_bias": {"1000": 1}}, "logit_bias", "is not a token id"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias", "is not a token id"),
        ({"stop_token_ids": [1000]}, "stop_token_ids", "1000 is not a token id"),
        ({"stop": [7, 1000]}, "stop_token_ids", "1000 is not a token id"),
        ({"top_logprobs": 3}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": ["a", 1]}, "stop", "not both"),
        ({"stop": ["a"] * 65}, "stop", "length <= 64"),
        ({"seed": 2**63}, "seed", "<= 9223372036854775807"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not given with streams"),
        ({"tools": [{"type": "function"}]}, "tools", "tool calling is not supported yet"),
        ({"tool_choice": "required"}, "tool_choice", "tool calling is not supported yet"),
        ({"functions": [{"name": "f"}]}, "functions", "tool calling is not supported yet"),
        ({"modalities": ["audio"]}, "modalities", "text"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "`role` is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "`content` is required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]", "'image_url' are not supported"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]", "object with a `type`"),
        ({"messages": [{"role": "user", "content": "x", "extra": DEEP}]}, "messages[0]", "nested"),
        ({"messages": "hello"}, "messages", "expected `array`"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs the field"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}}, "response_format.json_schema", "nested"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "response_format", "only one of"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[1]"}, "guided_json", "schema object"),
        ({"chat_template_args": {}, "chat_template_kwargs": {}}, "chat_template_kwargs", "two names"),
        ({"chat_template_args": DEEP}, "chat_template_args", "nested"),
        ({"dynamo": {}, "nvext": {}}, "nvext", "two names"),
        ({"dynamo": {"annotations": ["workers"]}}, "dynamo.annotations[0]", "'workers'"),
        ({"dynamo": {"instance": 2**64}}, "dynamo.instance", "2^64"),
        ({"dynamo": {"token_ids": [5, 2000]}}, "prompt", "not in the vocabulary"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude each other"),
        ({"max_tokens": 1000}, "max_tokens", "context length is 1000"),
    ],
)
async def test_a_bad_value_is_refused_by_name(site, fields, param, says):
    response = await site.client.post("/v1/chat/completions", json={"model": "m", "messages": USER} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert not site.model.starts


async def test_every_unknown_field_is_named_with_the_closest_known_one(site):
    fields = {"temprature": 1, "zzz": 2, "dynamo": {"sesion": "a"}, "stream_options": {"include_use": True}}
    error = (await site.chat(**fields)).json()["error"]
    assert error["message"] == (
        "unknown fields: `temprature` (did you mean `temperature`?), `zzz`, `dynamo.sesion` (did you mean `session`?), "
        "`stream_options.include_use` (did you mean `include_usage`?)"
    )
    error = (await site.complete(**{f"u{i}": 1 for i in range(30)})).json()["error"]
    assert error["message"].endswith("and 10 more")


async def test_a_missing_field_is_named(site):
    response = await site.client.post("/v1/chat/completions", json={"messages": USER})
    assert response.json()["error"] == {
        "message": "the field `model` is required",
        "type": "invalid_request_error",
        "param": "model",
        "code": "invalid_request",
    }


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b'{"model": nope}', "byte 14"),
        (b'{"model":"m","messages":[]} trailing', "byte 29"),
        (b'{"model":"\xff\xfe"}', "not valid UTF-8"),
        (b'{"model":"\\ud800"}', "not valid JSON"),
        (b"[]", "got `array`"),
        (b"null", "got `null`"),
        (b"[" * 100_000, "nested"),
        (b'{"model":"m","messages":[' + b'{"a":' * 100_000, "nested"),
        (b'{"model":"m","zzz":' + b"[" * 100_000, "nested"),
        (b"\xef\xbb\xbf{}", "byte 0"),
        (b"model=m&messages=x", "byte 0"),
        (b'{"model":"m","messages":[],"temperature":1e999}', "out of range"),
    ],
)
async def test_what_is_no_json_is_told_where(site, body, says):
    response = await site.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "guided"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"n": 2}, "n"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused(start, fields, needs):
    async with start(model=FakeModel("m", capabilities=())) as site:
        response = await site.chat(**fields)
        assert response.status_code == 400
        assert f"does not support {needs}" in response.json()["error"]["message"]
        assert (await site.chat()).status_code == 200


async def test_a_prompt_that_is_too_long_says_so_in_numbers(start):
    async with start(model=FakeModel("m", context_length=20)) as site:
        error = (await site.chat("x" * 100)).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "20" in error["message"]
        assert "106" in error["message"]


async def test_a_model_that_does_not_chat_says_what_it_does(start):
    async with start(model=FakeModel("m", surfaces=("completions",))) as site:
        assert "does not answer chat; it offers completions" in (await site.chat()).json()["error"]["message"]


@pytest.mark.parametrize("header", [("x-dynamo-priority", "high"), ("x-dynamo-instance", "-1"), ("x-dynamo-priority", "9" * 30)])
async def test_a_header_that_must_be_a_number_is_named(site, header):
    response = await site.client.post("/v1/chat/completions", json={"model": "m", "messages": USER}, headers=dict([header]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, header[0])


async def test_direct_routing_can_be_turned_off(start):
    async with start(config=Frontend(direct_routing=False)) as site:
        assert (await site.chat(dynamo={"instance": 5})).status_code == 400
        body = {"model": "m", "messages": USER}
        assert (await site.client.post("/v1/chat/completions", json=body, headers={"x-dynamo-instance": "5"})).status_code == 400
        assert (await site.chat()).status_code == 200
