"""The HTTP surface in numbers: Prometheus series with the names and meanings that Dynamo's users know.

Observed once per request, except for the time between tokens: that is one addition to a plain list for each read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.siblings import Siblings

PREFIX = "dynamo_frontend_"

TTFT_BUCKETS = (0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1, 2.2, 4.7, 10, 22, 48, 100, 220, 480)
ITL_BUCKETS = (0.0018, 0.0031, 0.0054, 0.0094, 0.016, 0.028, 0.049, 0.085, 0.15, 0.26, 0.45, 0.78, 1.4, 2.4, 4.1, 7.2, 12.5, 22, 80)
DURATION_BUCKETS = (0.1, 0.5, 1, 2, 3.9, 7.7, 15, 30, 60, 120, 250, 510)
TOKEN_BUCKETS = (50, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000)


class ItlHistogram(Collector):
    """Seconds between output tokens, by model, each token counted once.

    A read that merges k tokens after a pause of t seconds counts as k observations of t / k. The library's own histogram takes
    one observation at a time, under a lock: too dear for something that happens at every read.
    """

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = [*buckets, float("inf")]
        self._models: dict[str, ItlRecorder] = {}

    def recorder(self, model: str) -> ItlRecorder:
        if (recorder := self._models.get(model)) is None:
            recorder = self._models[model] = ItlRecorder(self._bounds)
        return recorder

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model"])
        for model, recorder in self._models.items():
            total, cumulative = 0, []
            for bound, count in zip(self._bounds, recorder.counts, strict=True):
                total += count
                cumulative.append((floatToGoString(bound), total))
            family.add_metric([model], cumulative, recorder.sum)
        yield family

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self._name, self._documentation, labels=["model"])


class ItlRecorder:
    """The counts of one model. Written by the event loop's thread alone."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: list[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.sum = 0.0

    def observe(self, seconds: float, tokens: int) -> None:
        """`tokens` arrived together, `seconds` after those before."""
        self.counts[bisect_left(self.bounds, seconds / tokens)] += tokens
        self.sum += seconds


class _Model:
    """The children of one model, bound once."""

    __slots__ = ("cached", "duration", "inflight", "input", "itl", "output", "output_total", "ttft")

    def __init__(self, m: HttpMetrics, model: str) -> None:
        self.inflight = m.inflight.labels(model)
        self.duration = m.duration.labels(model)
        self.ttft = m.ttft.labels(model)
        self.itl = m.itl.recorder(model)
        self.input = m.input_tokens.labels(model)
        self.output = m.output_tokens.labels(model)
        self.output_total = m.output_tokens_total.labels(model)
        self.cached = m.cached_tokens.labels(model)


class HttpMetrics:
    """Register once per process. The label `model` is `unknown` for requests that name no model of the catalog."""

    def __init__(self, registry: CollectorRegistry, *, tenant_labels: int = 100) -> None:
        """:param tenant_labels: so many tenants have a label of their own, whoever comes first; the others are `other`."""
        self.registry = registry
        self.siblings: Siblings | None = None
        """Whose numbers stand beside ours on `/metrics`."""
        labels = ["endpoint", "model", "request_type"]
        self.started = Counter(PREFIX + "requests_started", "Requests whose model is known and that are about to be routed", labels, registry=registry)
        self.requests = Counter(PREFIX + "requests", "Requests that ended", [*labels, "status", "error_type"], registry=registry)
        self.failures = Counter(PREFIX + "failures", "Requests that ended badly, by error code", ["code"], registry=registry)
        self.inflight = Gauge(PREFIX + "inflight_requests", "Requests between their start and their last byte", ["model"], registry=registry)
        self.disconnected = Counter(PREFIX + "disconnected_clients", "Clients that left before their answer was complete", registry=registry)
        self.cancellations = Counter(PREFIX + "model_cancellation", "Generations cancelled because nobody wanted the rest", labels, registry=registry)
        self.rejections = Counter(
            PREFIX + "model_rejection", "Requests refused because the fleet or this frontend is full", ["endpoint", "model"], registry=registry
        )
        self.duration = Histogram(PREFIX + "request_duration_seconds", "From arrival to the last byte", ["model"], buckets=DURATION_BUCKETS, registry=registry)
        self.ttft = Histogram(PREFIX + "time_to_first_token_seconds", "From arrival to the first output", ["model"], buckets=TTFT_BUCKETS, registry=registry)
        self.itl = ItlHistogram(PREFIX + "inter_token_latency_seconds", "Between output tokens", ITL_BUCKETS)
        registry.register(self.itl)
        self.input_tokens = Histogram(PREFIX + "input_sequence_tokens", "Prompt tokens of a request", ["model"], buckets=TOKEN_BUCKETS, registry=registry)
        self.output_tokens = Histogram(PREFIX + "output_sequence_tokens", "Generated tokens of a request", ["model"], buckets=TOKEN_BUCKETS, registry=registry)
        self.output_tokens_total = Counter(PREFIX + "output_tokens", "Generated tokens", ["model"], registry=registry)
        self.cached_tokens = Histogram(
            PREFIX + "cached_tokens", "Prompt tokens that an engine took from its cache", ["model"], buckets=TOKEN_BUCKETS, registry=registry
        )
        self.tenant_requests = Counter(PREFIX + "tenant_requests", "Requests that ended, by tenant", ["tenant", "status"], registry=registry)
        self.tenant_tokens = Counter(PREFIX + "tenant_tokens", "Tokens, by tenant and kind", ["tenant", "kind"], registry=registry)
        self._started, self._ended = cache(self.started.labels), cache(self.requests.labels)  # the library takes a lock to find a child
        self._models: dict[str, _Model] = {}
        self._tenants: set[str] = set()
        self._tenant_labels = tenant_labels

    def itl_recorder(self, model: str) -> ItlRecorder:
        return self.itl.recorder(model)

    def begin(self, exchange: Exchange) -> None:
        """The model is known; the request is about to be routed."""
        self._started(exchange.endpoint, exchange.model, _type(exchange)).inc()
        self._model(exchange.model).inflight.inc()

    def end(self, exchange: Exchange, seconds: float) -> None:
        """The last byte is out, or nobody wants it."""
        model, kind = exchange.model or "unknown", _type(exchange)
        self._ended(exchange.endpoint, model, kind, "error" if exchange.error_type else "success", exchange.error_type).inc()
        if exchange.error_type:
            self.failures.labels(exchange.error_code).inc()
            if exchange.error_type == "overload":
                self.rejections.labels(exchange.endpoint, model).inc()
            elif exchange.error_type == "cancelled":
                self.disconnected.inc()
                if exchange.model:
                    self.cancellations.labels(exchange.endpoint, model, kind).inc()
        if exchange.account is not None:
            self._count_tenant(exchange, exchange.account)
        if not exchange.model:
            return
        children = self._model(model)
        children.inflight.dec()
        children.duration.observe(seconds)
        if exchange.first_token:
            usage = exchange.usage
            children.ttft.observe(exchange.first_token - exchange.arrived)
            children.input.observe(usage.prompt_tokens)
            children.output.observe(usage.completion_tokens)
            children.output_total.inc(usage.completion_tokens)
            children.cached.observe(usage.cached_tokens)

    def _count_tenant(self, exchange: Exchange, tenant: str) -> None:
        if tenant not in self._tenants:
            if len(self._tenants) < self._tenant_labels:
                self._tenants.add(tenant)
            else:
                tenant = "other"
        usage = exchange.usage
        self.tenant_requests.labels(tenant, str(exchange.status)).inc()
        for kind, tokens in (("prompt", usage.prompt_tokens), ("cached", usage.cached_tokens), ("completion", usage.completion_tokens)):
            if tokens:
                self.tenant_tokens.labels(tenant, kind).inc(tokens)

    def _model(self, model: str) -> _Model:
        if (children := self._models.get(model)) is None:
            children = self._models[model] = _Model(self, model)
        return children


def _type(exchange: Exchange) -> str:
    return "stream" if exchange.stream else "unary"
