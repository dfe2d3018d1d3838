"""The planner in numbers. `docs/reference/metrics.md` lists the series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dynamo_planner.record import Decision


class PlannerMetrics:
    """Register once per process; `saw` takes each decision."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter("dynamo_planner_decisions", "Decisions, by what was done.", ["action"], registry=registry)
        self.replicas = Gauge("dynamo_planner_replicas", "Replicas by role: desired, ready, wanted before constraints, target.", ["role", "state"],
                              registry=registry)
        self.observed = Gauge("dynamo_planner_observed", "What was seen last.", ["what"], registry=registry)
        self.predicted = Gauge("dynamo_planner_predicted", "The forecast that was planned for.", ["what", "bound"], registry=registry)
        self.constrained = Counter("dynamo_planner_constrained", "Decisions in which a constraint changed a target.", ["constraint", "role"], registry=registry)
        self.stuck = Gauge("dynamo_planner_stuck", "Things that are wanted and do not happen.", registry=registry)
        self.gpu_seconds = Counter("dynamo_planner_gpu_seconds", "GPUs of the replicas that were there, times seconds.", registry=registry)
        self.cold_start = Gauge("dynamo_planner_cold_start_seconds", "From a decision to a replica that serves.", registry=registry)
        self.seconds = Histogram("dynamo_planner_decision_seconds", "Observing, deciding and acting.", registry=registry,
                                 buckets=(.001, .003, .01, .03, .1, .3, 1, 3, 10, 30))
        self._last: float | None = None

    def saw(self, decision: Decision) -> None:
        self.decisions.labels(decision.action).inc()
        self.seconds.observe(decision.seconds)
        self.stuck.set(len(decision.stuck))
        self.cold_start.set(decision.cold_start)
        for role, seen in decision.fleet.items():
            wanted, target = decision.wanted.get(role), decision.targets.get(role)
            for state, count in (("desired", seen.desired), ("ready", seen.ready), ("wanted", wanted), ("target", target)):
                if count is not None:
                    self.replicas.labels(role, state).set(count)
        if self._last is not None and not any("the fleet" in part for part in decision.missing):
            gpus = sum((seen.ready + seen.starting + seen.draining) * seen.gpus_per_replica for seen in decision.fleet.values())
            self.gpu_seconds.inc(gpus * max(0.0, decision.at - self._last))
        self._last = decision.at
        if (load := decision.load) is not None:
            for what in ("rate", "prompt_tokens", "output_tokens", "cached_share", "in_progress", "held"):
                self.observed.labels(what).set(getattr(load, what))
        if (forecast := decision.forecast) is not None:
            for what in ("rate", "prompt_tokens", "output_tokens"):
                for bound, value in zip(("mean", "low", "high"), getattr(forecast, what), strict=True):
                    self.predicted.labels(what, bound).set(value)
        for said in decision.constraints:
            self.constrained.labels(said.by, said.role).inc()
