"""Spans from the caller's header to the engine, sent to a real receiver of OTLP over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from dynamo_core.context import Context
from dynamo_core.observability import tracing
from dynamo_core.testing.cluster import Cluster, read_all

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver:
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: set[str] = set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.paths.add(self.path)
                message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                receiver.spans += [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    tracing.shutdown()
    receiver.server.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


async def test_spans_follow_the_request_from_the_callers_header_to_the_engine(receiver: Receiver) -> None:
    tracing.setup("test", receiver.url)
    async with Cluster.up(workers=1) as cluster:
        context = Context("traced", traceparent=f"00-{TRACE}-{CALLER}-01")
        await read_all(await cluster.generate("a secret prompt", max_tokens=4, context=context))
    tracing.shutdown()
    spans = {span.name: span for span in receiver.spans if span.trace_id.hex() == TRACE}
    assert set(spans) == {"generate", "engine.generate"}
    assert spans["generate"].parent_span_id.hex() == CALLER
    assert spans["engine.generate"].parent_span_id == spans["generate"].span_id
    assert attributes(spans["generate"])["request.id"] == attributes(spans["engine.generate"])["request.id"] == "traced"
    assert attributes(spans["engine.generate"])["output.tokens"] == 4
    routed = spans["generate"].events[0]
    assert routed.name == "routed"
    assert attributes(routed)["worker"] == attributes(spans["generate"])["workers"]
    assert b"secret" not in b"".join(span.SerializeToString() for span in receiver.spans)


async def test_a_caller_that_does_not_sample_is_not_traced(receiver: Receiver) -> None:
    tracing.setup("test", receiver.url)
    async with Cluster.up(workers=1) as cluster:
        await read_all(await cluster.generate("hi", max_tokens=1, context=Context("quiet", traceparent=f"00-{TRACE}-{CALLER}-00")))
    tracing.shutdown()
    assert [span for span in receiver.spans if span.trace_id.hex() == TRACE] == []


async def test_a_failure_is_in_the_span(receiver: Receiver) -> None:
    tracing.setup("test", receiver.url)
    async with Cluster.up(workers=1, options={"context_length": 8}) as cluster:
        context = Context("bad", traceparent=f"00-{TRACE}-{CALLER}-01")
        generation = await cluster.generate("hi", max_tokens=4, context=context)
        generation.cancel("gone")
    tracing.shutdown()
    assert {span.name for span in receiver.spans if span.trace_id.hex() == TRACE} >= {"generate"}


async def test_without_an_endpoint_the_callers_context_is_passed_on() -> None:
    given = f"00-{TRACE}-{CALLER}-01"
    async with Cluster.up(workers=1) as cluster:
        context = Context("untraced", traceparent=given)
        await read_all(await cluster.generate("hi", max_tokens=1, context=context))
        assert context.traceparent == given


async def test_several_prompts_of_one_request_are_siblings(receiver: Receiver) -> None:
    tracing.setup("test", receiver.url)
    async with Cluster.up(workers=1) as cluster:
        context = Context("several", traceparent=f"00-{TRACE}-{CALLER}-01")
        for generation in [await cluster.generate("hi", max_tokens=1, context=context.fork()) for _ in range(2)]:
            await read_all(generation)
    tracing.shutdown()
    assert {span.parent_span_id.hex() for span in receiver.spans if span.name == "generate"} == {CALLER}


@pytest.mark.parametrize(("written", "asked"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/v1/traces", "/v1/traces"), ("/otel/traces?tenant=a", "/otel/traces?tenant=a")])
def test_the_address_of_a_collector_is_enough(receiver: Receiver, written: str, asked: str) -> None:
    tracing.setup("test", receiver.url.removesuffix("/v1/traces") + written)
    tracing.start("alone").end()
    tracing.shutdown()
    assert receiver.paths == {asked}
