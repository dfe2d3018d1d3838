"""What a stack of real processes tells of itself: traces, logs and metrics, and never a prompt."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "xyzzy plugh, the magic words"


@pytest.fixture
def collector():
    """An OTLP/HTTP receiver; gives its URL and the spans by service."""
    spans: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in message.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1/traces", spans
    server.shutdown()


@pytest.mark.slow
def test_a_request_is_seen_in_traces_logs_and_metrics_and_its_prompt_in_none(up, collector) -> None:
    url, spans = collector
    stack = up(f"""
[frontend]
port = 0
[observability]
otlp_endpoint = "{url}"
log_level = "debug"
[[workers]]
count = 2
engine = {{ use = "echo" }}
""")
    with httpx.Client(base_url=stack.url, timeout=30) as client:
        headers = {"x-request-id": "find-me", "traceparent": f"00-{TRACE}-{CALLER}-01"}
        body = {"model": "echo", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 9, "stream": True}
        assert client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
        client.post("/v1/chat/completions", json=body | {"temprature": PROMPT})
        client.post("/v1/completions", json={"model": "echo", "prompt": PROMPT * 500})
        metrics = client.get("/metrics").text
        decision = client.get("/debug/decisions/find-me").text
        fleet = client.get("/debug/fleet").text
        workers = []
        for file in (stack.folder / "discovery").rglob("*status%2Fdynamo%2Fbackend*"):
            base = "http://" + file.read_bytes().split(b"http://")[-1].split(b'"')[0].strip().decode()
            workers.append(httpx.get(f"{base}/metrics").text)
            assert httpx.get(f"{base}/health").json()["status"] == "ready"
            assert httpx.get(f"{base}/live").status_code == 200
            assert httpx.get(f"{base}/control").json() == {"actions": []}
    assert stack.stop() == 0

    assert sum('dynamo_component_requests_total{dynamo_component="backend",dynamo_namespace="dynamo",outcome="done"}' in text for text in workers) >= 1
    assert "dynamo_frontend_requests_total" in metrics
    assert 'dynamo_frontend_model_ready{model="echo"} 1.0' in metrics

    traced = {span.name: (service, span) for service, span in spans if span.trace_id.hex() == TRACE}
    assert {name: service for name, (service, _) in traced.items()} == {"generate": "dynamo-frontend", "engine.generate": "dynamo-backend"}
    assert traced["generate"][1].parent_span_id.hex() == CALLER
    assert traced["engine.generate"][1].parent_span_id == traced["generate"][1].span_id

    lines = [line.split(None, 1)[1] for line in stack.lines if "{" in line and "find-me" in line]
    finished = next(record for record in map(json.loads, lines) if record["event"] == "request finished")
    assert finished["request_id"] == "find-me"
    assert finished["status"] == 200
    assert finished["completion_tokens"] == 9
    assert finished["role"] == "frontend"

    told = stack.text + metrics + decision + fleet + "".join(workers) + "".join(str(span) for _, span in spans)
    assert "xyzzy" not in told
    assert "plugh" not in told


@pytest.mark.slow
def test_a_collector_that_is_away_costs_requests_nothing_and_the_end_little(up) -> None:
    stack = up('[frontend]\nport = 0\n[observability]\notlp_endpoint = "http://127.0.0.1:9/v1/traces"\n[[workers]]\nengine = { use = "echo" }\n')
    answer = httpx.post(f"{stack.url}/v1/completions", json={"model": "echo", "prompt": "abc", "max_tokens": 3}, timeout=30)
    assert answer.json()["choices"][0]["text"] == "abc"
    assert stack.stop() == 0
