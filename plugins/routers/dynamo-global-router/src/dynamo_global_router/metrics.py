"""What the global router exports: its own series, and those of each pool with a label `pool`. Touched once a request or at a scrape, never per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo_global_router.pool import Pool
from dynamo_global_router.record import PoolDecision

STATES = ("ready", "degraded", "full", "gone")


class RouterMetrics:
    """`docs/reference/metrics.md` lists the series."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "dynamo_global_router_"
        self._decisions = Counter(prefix + "decisions", "Requests by the pool that they were sent to first, and how it was chosen.", ["pool", "kind"],
                                  registry=registry)
        self._failures = Counter(prefix + "failures", "Requests that a pool failed before their first output, by the code of the error.", ["pool", "code"],
                                 registry=registry)
        self._targets = Counter(prefix + "targets", "Requests with a target, by the pool that served: met or missed.", ["pool", "target", "outcome"],
                                registry=registry)
        self._error = Histogram(prefix + "estimate_error_ratio", "How far the estimated time to the first token was off, as a share of what it was.", ["pool"],
                                buckets=(.05, .1, .2, .3, .5, 1, 2, 5), registry=registry)
        self._seconds = Histogram(prefix + "decision_seconds", "Time to choose a pool, record included.", registry=registry,
                                  buckets=(.00005, .0001, .0002, .0005, .001, .002, .005, .01, .1))
        self._faults = Counter(prefix + "strategy_faults", "Requests for which the strategy was left out because it broke its contract.", registry=registry)
        registry.register(_OfPools(pools))

    def decided(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def fault(self) -> None:
        self._faults.inc()

    def sent(self, decision: PoolDecision, pool: str) -> None:
        self._decisions.labels(pool, decision.kind).inc()

    def failed(self, pool: str, code: str) -> None:
        self._failures.labels(pool, code).inc()

    def finished(self, decision: PoolDecision) -> None:
        """The request has ended in the pool that served it."""
        pool, request = decision.served or "", decision.request
        for target, wanted, found in (("ttft", request.ttft_target_ms, decision.ttft_ms), ("itl", request.itl_target_ms, decision.itl_ms)):
            if wanted is not None and found is not None:
                self._targets.labels(pool, target, "met" if found <= wanted else "missed").inc()
        facts = next((row.facts for row in decision.rows if row.name == pool), None)
        if facts is not None and decision.ttft_ms:
            self._error.labels(pool).observe(abs(facts.estimate.ttft_ms - decision.ttft_ms) / decision.ttft_ms)

    def export(self) -> bytes:
        return generate_latest(self._registry)


class _OfPools(Collector):
    """The state of each pool, and the series that its pipeline exports, told apart by a label."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = pools

    def describe(self) -> Iterable[Metric]:
        return ()  # none are there yet

    def collect(self) -> Iterable[Metric]:
        states = GaugeMetricFamily("dynamo_global_router_pool_state", "1 for the state that the pool is in now.", labels=["pool", "state"])
        families: dict[str, Metric] = {"": states}
        for pool in self._pools:
            now = pool.look().row.state
            for state in STATES:
                states.add_metric([pool.name.name, state], float(state == now))
            for family in pool.registry.collect():
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
                merged.samples += [sample._replace(labels={**sample.labels, "pool": pool.name.name}) for sample in family.samples]
        return families.values()
