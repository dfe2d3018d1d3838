"""Whatever bytes arrive, the answer is a 200 or a 4xx in OpenAI's shape, never a 500."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import msgspec
from fake_catalog import FakeCatalog, FakeModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.fields import ChatBody, CompletionBody, Extension
from dynamo_core.frontend.metrics import HttpMetrics

APP = create_app(Frontend(), FakeCatalog(FakeModel("m")), metrics=HttpMetrics(CollectorRegistry()))
FIELDS = {path: [f.encode_name for f in msgspec.structs.fields(cls)] for path, cls in (("/v1/chat/completions", ChatBody), ("/v1/completions", CompletionBody))}
EXTENSION = [f.encode_name for f in msgspec.structs.fields(Extension)]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["m", "user", "text", "json_schema", "none", "auto", "x"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "content", "type"]), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(st.fixed_dictionaries({"role": scalars, "content": values}) | values, max_size=3)


def ask(path: str, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> tuple[int, bytes]:
    """One request through the application, in memory."""

    async def talk() -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return pending.pop() if pending else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await APP({"type": "http", "method": "POST", "path": path, "headers": headers or []}, receive, send)  # type: ignore[arg-type]
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    return asyncio.run(talk())


def check(path: str, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    status, answer = ask(path, body, headers)
    assert status == 200 or 400 <= status < 500, (status, answer)
    if status != 200:
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    assert b'"code":"internal"' not in answer


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
logging.getLogger("asyncio").setLevel(logging.ERROR)


@FUZZ
@given(st.sampled_from(sorted(FIELDS)), st.binary(max_size=200))
def test_any_bytes(path, body):
    check(path, body)


@FUZZ
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_any_json_in_known_fields(path, data):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"model": "m", "prompt": "x"}
    for name in data.draw(st.lists(st.sampled_from(FIELDS[path]), max_size=3, unique=True)):
        body[name] = data.draw(messages if name == "messages" else values)
    if data.draw(st.booleans()):
        body["dynamo"] = {name: data.draw(values) for name in data.draw(st.lists(st.sampled_from(EXTENSION), max_size=3))}
    check(path, json.dumps(body).encode("utf-8", "surrogatepass"))


@FUZZ
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"x-request-id", b"traceparent", b"x-dynamo-session-id", b"x-dynamo-priority", b"x-dynamo-instance", b"x-tenant-id"]),
            st.binary(max_size=40),
        ),
        max_size=4,
    )
)
def test_any_headers(headers):
    check("/v1/completions", b'{"model":"m","prompt":"x"}', headers)


@FUZZ
@given(st.binary(min_size=1, max_size=3), st.integers(0, 120))
def test_a_good_body_with_some_bytes_replaced(noise, at):
    body = b'{"model":"m","messages":[{"role":"user","content":"hello"}],"stream":true,"max_tokens":5,"stop":["x"],"dynamo":{"priority":1}}'
    check("/v1/chat/completions", body[:at] + noise + body[at + len(noise) :])
