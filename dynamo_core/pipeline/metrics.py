"""What the pipeline exports: per request, per migration, per change of the fleet; never per token."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dynamo_core.pipeline.waiting import QueueFamilies


class PipelineMetrics:
    """Series of one model. `docs/reference/metrics.md` lists them."""

    def __init__(self, families: PipelineFamilies, model: str) -> None:
        self._families = families
        self._model = model
        self._decision_seconds = families.decision_seconds.labels(model=model)
        self._predicted = families.predicted.labels(model=model)
        self._found = families.found.labels(model=model)
        self._prediction_error = families.prediction_error.labels(model=model)

    def migrated(self, kind: str, outcome: str, seconds: float) -> None:
        """:param kind: `new_request` or `ongoing_request`. :param outcome: `success` or `failure`."""
        if outcome == "success":
            self._families.migrations.labels(model=self._model, migration_type=kind).inc()
        self._families.migration_seconds.labels(model=self._model, migration_type=kind, outcome=outcome).observe(seconds)

    def workers(self, ready: int, registered: int) -> None:
        self._families.model_ready.labels(model=self._model).set(1 if ready else 0)
        self._families.workers.labels(model=self._model, state="ready").set(ready)
        self._families.workers.labels(model=self._model, state="registered").set(registered)

    def decided(self, seconds: float) -> None:
        self._decision_seconds.observe(seconds)

    def regret(self, cause: str, tokens: int) -> None:
        self._families.regret.labels(model=self._model, cause=cause).inc(tokens)

    def predicted(self, predicted: int, found: int) -> None:
        """Cached prompt tokens of one request: what its router believed, and what its engine said."""
        self._predicted.inc(predicted)
        self._found.inc(found)
        self._prediction_error.observe(found - predicted)

    def shadowed(self, verdict: str) -> None:
        self._families.shadowed.labels(model=self._model, verdict=verdict).inc()

    def fault(self, policy: str) -> None:
        self._families.faults.labels(policy=policy).inc()


class PipelineFamilies:
    """The metric families, shared by all models of a frontend."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.migrations = Counter("dynamo_frontend_model_migration", "Requests that moved to another worker.", ["model", "migration_type"], registry=registry)
        self.migration_seconds = Histogram("dynamo_frontend_model_migration_duration_seconds", "From the loss to the next worker.",
                                           ["model", "migration_type", "outcome"], buckets=(.001, .005, .01, .05, .1, .5, 1, 5, 15, 60), registry=registry)
        self.model_ready = Gauge("dynamo_frontend_model_ready", "1 when the model is served.", ["model"], registry=registry)
        self.workers = Gauge("dynamo_frontend_workers", "Workers by state: registered, or ready to serve.", ["model", "state"], registry=registry)
        self.faults = Counter("dynamo_router_policy_faults", "Decisions for which a policy was skipped because it broke its contract.", ["policy"],
                              registry=registry)
        self.queue = QueueFamilies(registry)
        self.regret = Counter("dynamo_router_regret_tokens", "Cached prompt tokens that were passed by, or believed in and not there, by cause.",
                              ["model", "cause"], registry=registry)
        self.predicted = Counter("dynamo_router_predicted_cached_tokens", "Prompt tokens that chosen workers were believed to hold.", ["model"],
                                 registry=registry)
        self.found = Counter("dynamo_router_found_cached_tokens", "Prompt tokens of the same requests that their engines had.", ["model"], registry=registry)
        self.prediction_error = Histogram("dynamo_router_prediction_error_tokens", "Cached tokens of a request: found minus predicted.", ["model"],
                                          buckets=(-16384, -4096, -1024, -256, -64, -16, -1, 0, 16, 64, 256, 1024, 4096, 16384), registry=registry)
        self.shadowed = Counter("dynamo_router_shadow_decisions", "Decisions of the shadow stack: same as the live one, other, nobody, failed, skipped.",
                                ["model", "verdict"], registry=registry)
        self.decision_seconds = Histogram("dynamo_router_decision_seconds", "Time to decide, record included.", ["model"],
                                          buckets=(.00001, .00002, .00005, .0001, .0002, .0005, .001, .002, .005, .01, .1), registry=registry)
