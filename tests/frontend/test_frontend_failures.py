"""What clients see when something goes wrong: before the first byte a status, after it a last frame."""

from __future__ import annotations

import json
import logging

import pytest
from fake_catalog import words

from dynamo_core import errors
from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.contract import Principal
from dynamo_core.types import Delta

FAILURES = [
    (errors.NoWorker("this request", ["a: full"]), 503, "service_unavailable", "no_worker"),
    (errors.AllBusy("this request"), 529, "overloaded_error", "overloaded"),
    (errors.RateLimited("slower", retry_after=7), 429, "rate_limit_error", "rate_limit_exceeded"),
    (errors.Disconnected("the worker is gone"), 502, "server_error", "disconnected"),
    (errors.StreamTimeout("silence"), 504, "timeout_error", "stream_timeout"),
    (errors.WorkerOverloaded("full"), 529, "overloaded_error", "worker_overloaded"),
    (errors.EngineDead("dead"), 503, "service_unavailable", "engine_dead"),
    (errors.EngineFailed("bad grammar"), 500, "server_error", "engine_failed"),
    (errors.EndpointNotFound("nobody"), 503, "service_unavailable", "endpoint_not_found"),
    (errors.RequestError("the engine refuses", param="prompt"), 400, "invalid_request_error", "invalid_request"),
    (errors.StoreUnavailable("no store"), 503, "service_unavailable", "store_unavailable"),
    (RuntimeError("secret detail"), 500, "server_error", "internal"),
    (errors.PluginError("some-plugin", "secret detail"), 500, "server_error", "plugin"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES, ids=[type(f[0]).__name__ for f in FAILURES])
@pytest.mark.parametrize("where", ["start", "first read"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_byte_is_a_status(site, error, status, kind, code, where, stream):
    if where == "start":
        site.model.start_error = error
    else:
        site.model.script = [error]
    response = await site.chat(stream=stream)
    body = response.json()["error"]
    assert (response.status_code, body["type"], body["code"]) == (status, kind, code)
    assert "secret" not in response.text
    if status in (429, 503, 529):
        assert int(response.headers["retry-after"]) >= 1
    if status == 500 and code in ("internal", "plugin"):
        assert response.headers["x-request-id"] in body["message"]
    if where == "first read":
        assert site.model.generations[0].cancelled


@pytest.mark.parametrize(("error", "status", "kind", "code"), FAILURES, ids=[type(f[0]).__name__ for f in FAILURES])
async def test_an_error_after_the_first_byte_is_a_frame_and_then_the_end_mark(site, error, status, kind, code):
    site.model.script = [Delta(text="a", token_ids=[1]), error]
    response = await site.chat(stream=True)
    frames = response.text.split("\n\n")
    assert response.status_code == 200
    assert frames[2:] == ["data: [DONE]", ""]
    assert json.loads(frames[1][6:])["error"]["code"] == code
    assert json.loads(frames[1][6:])["error"]["type"] == kind
    assert "secret" not in response.text
    assert site.model.generations[0].cancelled
    await site.settled()
    assert site.finished[-1]["status"] == status


async def test_a_whole_answer_that_fails_on_the_way_still_has_a_status(each):
    each.model.script = [Delta(text="a", token_ids=[1]), errors.EngineDead("dead")]
    response = await each.chat()
    assert response.status_code == 503


async def test_what_is_unexpected_goes_to_the_log_with_its_request_id_and_without_the_prompt(site, caplog):
    site.model.start_error = RuntimeError("a detail")
    with caplog.at_level(logging.INFO):
        response = await site.chat("the secret prompt")
    records = [r for r in caplog.records if r.exc_info]
    assert [r.request_id for r in records] == [response.headers["x-request-id"]]
    assert "a detail" in caplog.text
    assert "secret prompt" not in caplog.text


async def test_an_error_after_the_last_finish_reason_does_not_spoil_the_answer(site):
    site.model.script = [*words("a"), errors.Disconnected("late")]
    response = await site.chat(stream=True)
    assert response.text.endswith("data: [DONE]\n\n")
    assert "error" not in response.text
    await site.settled()
    assert site.finished[-1]["status"] == 200


async def test_a_generation_that_ended_by_itself_is_not_cancelled(each):
    for stream in (True, False):
        await each.chat(stream=stream)
        await each.settled()
        generation = each.model.generations[-1]
        assert (generation.ended, generation.cancelled) == (True, None)


async def test_no_token_in_time_is_504(start):
    async with start(config=Frontend(first_token_timeout=0.1)) as site:
        site.model.script = [30.0, *words("a")]
        response = await site.chat(stream=True)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "stream_timeout")
        assert "first_token_timeout" in response.json()["error"]["message"]
        assert site.model.generations[0].cancelled
        site.model.start_delay = 30.0
        assert (await site.chat()).status_code == 504


async def test_an_answer_that_takes_too_long_ends_with_an_error(run):
    async with run(config=Frontend(request_timeout=0.3)) as site:
        site.model.script = [Delta(text="a", token_ids=[1]), 30.0]
        response = await site.chat(stream=True)
        assert "request_timeout" in response.text
        assert response.text.endswith("data: [DONE]\n\n")
        assert (await site.chat()).status_code == 504


async def test_one_request_too_many_is_529_at_once(start):
    import asyncio

    async with start(config=Frontend(max_requests=1)) as site:
        gate = asyncio.Event()
        site.model.script = [gate, *words("a")]
        first = asyncio.create_task(site.chat())
        async with asyncio.timeout(20):
            while not site.model.starts:
                await asyncio.sleep(0.005)
        second = await site.chat()
        assert (second.status_code, second.json()["error"]["code"]) == (529, "overloaded")
        gate.set()
        assert (await first).status_code == 200
        assert (await site.chat()).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_wrong_methods_say_what_is_right(each, path):
    response = await each.client.request("DELETE", path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert response.headers["allow"]
    assert response.headers["x-request-id"]


async def test_options_and_head_are_answered(each):
    response = await each.client.options("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (204, "OPTIONS, POST")
    assert (await each.client.head("/live")).status_code == 200
    assert (await each.client.head("/v1/chat/completions")).status_code == 405


async def test_unknown_paths_and_models_are_404_in_openais_shape(each):
    for response in (await each.client.get("/v2/nothing"), await each.chat(model="other")):
        assert response.status_code == 404
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (await each.chat(model="other")).json()["error"]["code"] == "model_not_found"


async def test_a_model_that_is_not_ready_says_what_is_missing(site):
    site.model.missing = "no prefill worker"
    response = await site.chat()
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "no prefill worker" in response.json()["error"]["message"]


class OneKey:
    async def authenticate(self, headers):
        if headers.get("authorization") != "Bearer right":
            raise errors.Unauthorized("a valid API key is needed")
        return Principal(tenant="acme", subject="key-1")


async def test_an_authenticator_guards_completions_and_models_and_names_the_tenant(run):
    async with run(authenticator=OneKey()) as site:
        for response in (await site.chat(), await site.client.get("/v1/models"), await site.client.get("/v1/models/m"), await site.client.get("/debug/fleet")):
            assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
            assert "www-authenticate" in response.headers
        assert (await site.client.get("/health")).status_code == 200
        site.client.headers["authorization"] = "Bearer right"
        site.client.headers["x-tenant-id"] = "somebody-else"
        assert (await site.chat()).status_code == 200
        assert site.model.starts[0][2].tenant == "acme"
        assert (await site.client.get("/v1/models")).status_code == 200
