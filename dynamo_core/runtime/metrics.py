"""What a worker process exports: bound once, touched once per request or per report, never per token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from dynamo_core.cards import ModelCard
from dynamo_core.types import Load


class ProcessRegistry(CollectorRegistry):
    """What a process exports: its own series, and those of the workers that it runs, each with the name of its worker.

    Workers export the same families, and engines may export families of ours (a global router has routers): what has one name is one family.
    """

    def __init__(self) -> None:
        super().__init__()
        self.workers: dict[str, Callable[[], Iterable[Metric]]] = {}
        """Read at each scrape."""

    def collect(self) -> Iterator[Metric]:
        if not self.workers:
            return iter(super().collect())
        found: dict[str, Metric] = {}
        for label, families in ({}, super().collect()), *(({"worker": worker}, series()) for worker, series in self.workers.items()):
            for family in families:
                merged = found.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
                merged.samples += [sample._replace(labels={**sample.labels, **label}) for sample in family.samples]
        return iter(found.values())


class WorkerMetrics:
    """Prometheus series of the worker role; `docs/reference/metrics.md` lists them."""

    def __init__(self, registry: CollectorRegistry, *, namespace: str, component: str) -> None:
        labels = {"dynamo_namespace": namespace, "dynamo_component": component}
        names = tuple(labels)
        self.registry = registry
        self._requests = Counter("dynamo_component_requests", "Requests by outcome: done, cancelled, or the code of the error.",
                                 [*names, "outcome"], registry=registry)
        self._labels = labels
        self._seconds = Histogram("dynamo_component_request_duration_seconds", "From arrival at the worker to the last output.", names,
                                  buckets=(.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600), registry=registry).labels(**labels)
        self._prompt = Counter("dynamo_component_prompt_tokens", "Prompt tokens received.", names, registry=registry).labels(**labels)
        self._output = Counter("dynamo_component_output_tokens", "Tokens generated.", names, registry=registry).labels(**labels)
        self._in_flight = Gauge("dynamo_component_inflight_requests", "Requests in progress.", names, registry=registry).labels(**labels)
        self._load_time = Gauge("dynamo_component_model_load_time_seconds", "From process start of the engine to ready.", names,
                                registry=registry).labels(**labels)
        self._total_blocks = Gauge("dynamo_component_total_blocks", "KV blocks that the engine has.", names, registry=registry).labels(**labels)
        ranked = [*names, "dp_rank"]
        self._running = Gauge("dynamo_component_engine_running", "Sequences that the engine works on.", ranked, registry=registry)
        self._waiting = Gauge("dynamo_component_engine_waiting", "Sequences that wait in the engine.", ranked, registry=registry)
        self._usage = Gauge("dynamo_component_kv_cache_usage", "Share of KV blocks in use, 0 to 1.", ranked, registry=registry)

    def started(self, card: ModelCard, seconds: float) -> None:
        self._load_time.set(seconds)
        self._total_blocks.set(card.total_blocks or 0)

    def watch_in_flight(self, count: Callable[[], float]) -> None:
        """`count()` is called at each scrape."""
        self._in_flight.set_function(count)

    def request(self, outcome: str, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        self._requests.labels(**self._labels, outcome=outcome).inc()
        self._seconds.observe(seconds)
        self._prompt.inc(prompt_tokens)
        self._output.inc(output_tokens)

    def refused(self, code: str) -> None:
        """A request that was not taken."""
        self._requests.labels(**self._labels, outcome=code).inc()

    def load(self, load: Load) -> None:
        labels = {**self._labels, "dp_rank": str(load.dp_rank)}
        self._running.labels(**labels).set(load.running)
        self._waiting.labels(**labels).set(load.waiting)
        self._usage.labels(**labels).set(load.kv_used_blocks / load.kv_total_blocks if load.kv_total_blocks else 0.0)
