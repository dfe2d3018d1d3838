"""Chat completions: what a client gets for what it sends."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_catalog import FakeModel, logprob, words

from dynamo_core.types import Delta


def events(response: httpx.Response) -> list[Any]:
    """The decoded chunks of a stream, which must end in the end mark."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


async def test_a_whole_answer_has_openais_shape(each):
    response = await each.chat()
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello, world", "refusal": None}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 2}}
    assert response.headers["x-dynamo-decision"] == "d1"
    assert "dynamo" not in body


async def test_a_stream_merges_the_role_into_the_first_text_and_ends_with_the_reason(each):
    chunks = events(await each.chat(stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "Hello"}, {"content": ","}, {"content": " world"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_include_usage_adds_one_chunk_without_choices_and_null_before(site):
    chunks = events(await site.chat(stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_continuous_usage_counts_up_in_every_chunk(site):
    chunks = events(await site.chat(stream=True, stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_several_choices_of_one_read_are_separate_events(site):
    site.model.script = [
        [Delta(index=0, text="a", token_ids=[1]), Delta(index=1, text="b", token_ids=[2])],
        Delta(index=1, finish_reason="length"),
        Delta(index=0, text="c", token_ids=[3], finish_reason="stop"),
    ]
    chunks = events(await site.chat(stream=True, n=2))
    seen = [(c["choices"][0]["index"], c["choices"][0]["delta"].get("content"), c["choices"][0]["finish_reason"]) for c in chunks]
    assert seen == [(0, "a", None), (1, "b", None), (1, None, "length"), (0, "c", None), (0, None, "stop")]
    site.model.script = [*words("x", "y", index=1, finish="length"), *words("z")]
    whole = (await site.chat(n=2)).json()
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in whole["choices"]] == [(0, "z", "stop"), (1, "xy", "length")]


async def test_a_choice_that_ends_without_text_still_has_a_first_chunk_with_the_role(site):
    site.model.script = [Delta(finish_reason="stop", token_ids=[2])]
    chunks = events(await site.chat(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]


async def test_text_that_is_still_held_back_makes_no_event(site):
    site.model.script = [Delta(text="a", token_ids=[1]), Delta(text="", token_ids=[2]), Delta(text="b", token_ids=[3]), Delta(finish_reason="stop")]
    assert len(events(await site.chat(stream=True))) == 3


async def test_text_survives_json_whatever_it_contains(site):
    text = 'quotes " \\ newline \n tab \t nul \0 emoji 🦙 separator \u2028 end'
    site.model.script = words("a", text)
    assert events(await site.chat(stream=True))[1]["choices"][0]["delta"]["content"] == text
    assert (await site.chat()).json()["choices"][0]["message"]["content"] == "a" + text


async def test_the_reason_to_stop_is_reported_when_there_is_one(site):
    site.model.script = [Delta(text="a", token_ids=[1]), Delta(finish_reason="stop", stop_reason="END")]
    assert events(await site.chat(stream=True))[-1]["choices"][0]["stop_reason"] == "END"
    site.model.script = [Delta(text="a", token_ids=[1]), Delta(finish_reason="stop", stop_reason=7)]
    assert (await site.chat()).json()["choices"][0]["stop_reason"] == 7


async def test_logprobs_have_openais_chat_shape(site):
    site.model.script = [
        Delta(text="Hé", token_ids=[5], logprobs=[logprob("Hé", 5)]),
        Delta(text="y", token_ids=[6], logprobs=[logprob("y", 6, float("-inf"))]),
        Delta(finish_reason="stop"),
    ]
    expected = {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169], "top_logprobs": [{"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169]}]}
    whole = (await site.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]
    assert whole["content"][0] == expected
    assert whole["content"][1]["logprob"] == -9999.0
    chunks = events(await site.chat(stream=True, logprobs=True, top_logprobs=1))
    assert chunks[0]["choices"][0]["logprobs"]["content"] == [expected]
    request, text, _ = site.model.starts[-1]
    assert request.logprobs == 1
    assert text.logprobs


async def test_every_sampling_field_reaches_the_engine(site):
    await site.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=7,
        frequency_penalty=1,
        presence_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        max_tokens=9,
        max_completion_tokens=5,
        min_tokens=2,
        stop=["END", "\n"],
        stop_token_ids=[3],
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
    )
    request, text, _ = site.model.starts[0]
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed) == (0.5, 0.9, 40, 0.1, 7)
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty, s.logit_bias) == (1, -1, 1.1, {5: -100})
    assert (request.stops.max_tokens, request.stops.min_tokens, request.stops.stop_token_ids, request.stops.ignore_eos) == (5, 2, (3,), True)
    assert (text.stop, text.include_stop, text.skip_special_tokens) == (("END", "\n"), True, False)


async def test_stop_takes_a_string_or_token_ids(site):
    await site.chat(stop="x")
    assert site.model.starts[-1][1].stop == ("x",)
    await site.chat(stop=[4, 5], stop_token_ids=[3])
    assert site.model.starts[-1][0].stops.stop_token_ids == (3, 4, 5)


async def test_the_models_own_sampling_fills_what_was_not_given(start):
    from dynamo_core.types import Sampling

    async with start(model=FakeModel("m", defaults=Sampling(temperature=0.6, top_k=20), default_max_tokens=17)) as site:
        await site.chat(top_k=5)
        request = site.model.starts[0][0]
        assert (request.sampling.temperature, request.sampling.top_k, request.stops.max_tokens) == (0.6, 5, 17)


async def test_without_max_tokens_the_rest_of_the_context_is_the_limit(site):
    await site.chat()
    request = site.model.starts[0][0]
    assert request.stops.max_tokens == 1000 - len(request.token_ids)


async def test_the_template_gets_messages_and_its_arguments(site):
    await site.chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low", chat_template="{{ messages }}", continue_final_message=True)
    rendered = site.model.preprocessor.rendered[0]
    assert rendered["messages"] == [{"role": "user", "content": "hi"}]
    assert rendered["arguments"] == {"reasoning_effort": "low", "enable_thinking": False}
    assert (rendered["template"], rendered["continue_final_message"], rendered["add_generation_prompt"]) == ("{{ messages }}", True, False)


async def test_token_ids_replace_template_and_tokenizer(site):
    response = await site.client.post(
        "/v1/chat/completions", json={"model": "m", "messages": [], "dynamo": {"token_ids": [5, 6, 7], "annotations": ["prompt_token_ids"]}}
    )
    assert site.model.starts[0][0].token_ids == [5, 6, 7]
    assert not site.model.preprocessor.rendered
    assert response.json()["dynamo"] == {"prompt_token_ids": [[5, 6, 7]]}


async def test_annotations_report_what_they_name_in_the_last_chunk(site):
    wanted = ["request_id", "worker", "decision", "timing", "token_ids", "formatted_prompt"]
    response = await site.chat(stream=True, stream_options={"include_usage": True}, nvext={"annotations": wanted})
    last = events(response)[-1]
    report = last["dynamo"]
    assert list(report) == wanted
    assert report["request_id"] == response.headers["x-request-id"]
    assert (report["worker"], report["decision"], report["token_ids"], report["formatted_prompt"]) == (["backend-000001"], ["d1"], [[0, 1, 2]], ["<user>hi"])
    assert 0 < report["timing"]["ttft_ms"] <= report["timing"]["total_ms"]
    assert last["usage"]["completion_tokens"] == 3


async def test_hints_come_from_the_extension_and_headers_beat_it(site):
    extension = {
        "priority": 3,
        "session": "s",
        "instance": 2**63,
        "expected_output_tokens": 50,
        "ttft_target_ms": 100,
        "itl_target_ms": 20,
        "required_taints": ["a"],
        "preferred_taints": {"b": 0.5},
        "cache_salt": "salt",
    }
    await site.chat(dynamo=extension)
    request, _, context = site.model.starts[-1]
    hints = request.hints
    assert (hints.priority, hints.session, hints.instance, hints.expected_output_tokens) == (3, "s", 2**63, 50)
    assert (hints.ttft_target_ms, hints.itl_target_ms, hints.required_taints, hints.preferred_taints) == (100, 20, ("a",), {"b": 0.5})
    assert request.cache_salt == "salt"
    assert (context.priority, context.session) == (3, "s")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {
        "x-dynamo-session-id": "t",
        "x-dynamo-priority": "-4",
        "x-dynamo-instance": "9",
        "x-tenant-id": "acme",
        "traceparent": trace,
        "x-request-id": "mine-1",
    }
    response = await site.client.post(
        "/v1/chat/completions", headers=headers, json={"model": "m", "messages": [{"role": "user", "content": "x"}], "dynamo": extension}
    )
    request, _, context = site.model.starts[-1]
    assert (request.hints.priority, request.hints.session, request.hints.instance) == (-4, "t", 9)
    assert (context.id, context.tenant, context.traceparent) == ("mine-1", "acme", trace)
    assert response.headers["x-request-id"] == "mine-1"


async def test_a_dry_run_answers_with_the_decision_and_generates_nothing(site):
    site.catalog.records["dry-r1"] = {"chosen": "backend-000001"}
    response = await site.client.post(
        "/v1/chat/completions", headers={"x-request-id": "r1"}, json={"model": "m", "messages": [{"role": "user", "content": "x"}], "dynamo": {"dry_run": True}}
    )
    assert response.json()["decision"] == "dry-r1"
    assert response.json()["record"] == {"chosen": "backend-000001"}
    assert response.headers["x-dynamo-decision"] == "dry-r1"
    assert not site.model.starts


async def test_two_requests_of_one_id_are_told_apart_inside_the_fleet(site):
    import asyncio

    gate = asyncio.Event()
    site.model.script = [gate, *words("a")]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    both = [asyncio.create_task(site.client.post("/v1/chat/completions", headers={"x-request-id": "same"}, json=body)) for _ in range(2)]
    async with asyncio.timeout(20):
        while len(site.model.starts) < 2:
            await asyncio.sleep(0.005)
    gate.set()
    assert [(await task).headers["x-request-id"] for task in both] == ["same", "same"]
    ids = [request.id for request, _, _ in site.model.starts]
    assert len(set(ids)) == 2
    assert all(id.startswith("same") for id in ids)


@pytest.mark.parametrize("given", ["bad id", "x" * 129, "ünï", ""])
async def test_a_request_id_that_could_forge_logs_is_replaced(site, given):
    response = await site.client.get("/live", headers={b"x-request-id": given.encode("latin-1")})
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


async def test_harmless_fields_are_accepted(site):
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "tools": [],
        "tool_choice": "none",
        "functions": None,
    }
    assert (await site.chat(**harmless)).status_code == 200
    assert (await site.chat(tools=[{"type": "function"}], tool_choice="none")).status_code == 200


async def test_text_parts_and_tool_history_pass_to_the_template(site):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    response = await site.client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert response.status_code == 200
    assert site.model.preprocessor.rendered[0]["messages"] == messages


async def test_json_formats_become_constraints(site):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await site.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}})
    assert site.model.starts[-1][0].guided.json_schema == schema
    await site.chat(response_format={"type": "json_object"})
    assert site.model.starts[-1][0].guided.json_object
    await site.chat(guided_json=json.dumps(schema))
    assert site.model.starts[-1][0].guided.json_schema == schema
    await site.chat(guided_choice=["a", "b"])
    assert site.model.starts[-1][0].guided.choice == ("a", "b")
    await site.chat(response_format={"type": "text"})
    assert site.model.starts[-1][0].guided is None


async def test_the_wrong_content_type_is_tolerated(site):
    body = b'{"model":"m","messages":[{"role":"user","content":"x"}]}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert (await site.client.post("/v1/chat/completions", content=body, headers={"content-type": content_type})).status_code == 200
