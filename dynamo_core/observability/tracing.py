"""Traces, per request and never per token. Off, and not even imported, until an endpoint is configured."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

LAST_SPANS = 3.0
"""Seconds that the last spans have at the end of the process."""

_tracer: Any = None
_propagator: Any = None
_provider: Any = None

Attribute = str | int | float | bool


class Span:
    """A span, or nothing: every method is safe and cheap when tracing is off."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any = None, traceparent: str | None = None) -> None:
        self._span = span
        self.traceparent = traceparent
        """What to send to the next hop: this span's context, or the caller's when tracing is off."""

    def set(self, name: str, value: Attribute) -> None:
        if self._span is not None:
            self._span.set_attribute(name, value)

    def event(self, name: str, attributes: Mapping[str, Attribute] | None = None) -> None:
        if self._span is not None:
            self._span.add_event(name, attributes)

    def end(self, error: BaseException | None = None) -> None:
        """Call exactly once."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        self._span.end()


def start(name: str, traceparent: str | None = None, attributes: Mapping[str, Attribute] | None = None) -> Span:
    """A span below `traceparent` (a W3C header value)."""
    if _tracer is None:
        return Span(None, traceparent)
    parent = _propagator.extract({"traceparent": traceparent}) if traceparent else None
    span = _tracer.start_span(name, context=parent, attributes=dict(attributes or {}))
    context = span.get_span_context()
    return Span(span, f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}")


def setup(service: str, endpoint: str | None, ratio: float = 1.0, *, exporter: Any = None) -> None:
    """Send spans to an OTLP/HTTP `endpoint` (`http://host:4318`, or the whole URL); `None` leaves tracing off.

    :param exporter: an OpenTelemetry span exporter to use in place of OTLP.
    """
    global _tracer, _propagator, _provider
    if endpoint is None and exporter is None:
        return
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    _provider = TracerProvider(resource=Resource.create({"service.name": service}), sampler=ParentBased(TraceIdRatioBased(ratio)))
    if exporter is not None:
        _provider.add_span_processor(SimpleSpanProcessor(exporter))
    elif endpoint is not None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=_traces(endpoint))))
    _tracer = _provider.get_tracer("dynamo")
    _propagator = TraceContextTextMapPropagator()


def _traces(endpoint: str) -> str:
    """Where a collector takes traces, unless the URL says it."""
    return endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"


def shutdown() -> None:
    """Send what is left and turn tracing off."""
    global _tracer, _provider
    if _provider is not None:
        # A collector that is away is tried again for a while, and nobody is to wait for that at the end.
        sending = threading.Thread(target=_provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(LAST_SPANS)
    _tracer = _provider = None
