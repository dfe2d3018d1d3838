"""What the planner's parts say to each other: what was seen, what is expected, what is proposed, what is decided.

A decision is made in four stages, and each is a plugin of the kind `planner_stage`, chosen by name in the configuration:

    predict     history -> Outlook                 one
    propose     view and outlook -> Proposal       any number
    reconcile   proposals -> targets               one
    constrain   targets -> targets                 any number, one after the other; the last word belongs to the last

Stages are pure: the same view gives the same answer, so that a decision can be made again later, or with twice the load.
Times are seconds, rates are per second, lengths are tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import attrs
import numpy as np
from numpy.typing import NDArray

from dynamo_core.scaling import RoleState

Floats = NDArray[np.float64]
Targets = Mapping[str, int]
"""Replicas by role."""

# ------------------------------------------------------------------ seen


@attrs.frozen
class Load:
    """What was asked of the fleet in one stretch of time."""

    at: float
    """Its end, on the planner's clock."""
    seconds: float
    """Its length."""
    rate: float = 0.0
    """Requests that arrived, per second; whether they were served is another question."""
    prompt_tokens: float = 0.0
    """Mean of a request."""
    output_tokens: float = 0.0
    """Mean of a request."""
    cached_share: float = 0.0
    """Of the prompt tokens, those that an engine had in its cache."""
    in_progress: float = 0.0
    held: float = 0.0
    """Requests that wait for a model without a worker."""
    ttft: float | None = None
    """Mean time to the first token; None when there was no first token."""
    itl: float | None = None
    """Mean time between tokens."""
    prompt_spread: float = 0.0
    """Variance of the prompt lengths over the square of their mean: 0 when all are alike."""


@attrs.frozen
class WorkerReport:
    """One worker's own word on how busy it is, summed over its ranks."""

    worker: str
    role: str
    running: int = 0
    waiting: int = 0
    waiting_prefill_tokens: int = 0
    kv_share: float = 0.0
    """Of its KV cache, what is in use."""
    slots: int = 0
    """Sequences that it works on at once; 0: it does not say."""
    at: float = 0.0


@attrs.frozen
class Observation:
    """Everything that is known now, and what should be known and is not."""

    at: float
    load: Load | None
    """Of the time since the observation before."""
    fleet: Mapping[str, RoleState]
    reports: Sequence[WorkerReport] = ()
    missing: tuple[str, ...] = ()
    """Which parts are missing and why, for people. With any, nothing is decided."""


# ------------------------------------------------------------------ expected


@attrs.frozen
class Forecast:
    """One series, some steps ahead. Between `low` and `high` it stays with the probability that the forecaster was asked for."""

    mean: Floats
    low: Floats
    high: Floats


@runtime_checkable
class Predictor(Protocol):
    """Kind `predictor`. Its attrs fields are its options. It keeps nothing between calls."""

    min_points: ClassVar[int]
    """With fewer, the last value is forecast instead."""
    seasonal: ClassVar[bool]
    """Whether it looks for the same time of another day, and so needs every point; others are not shown pauses of the load."""

    def forecast(self, history: Floats, steps: int, level: float) -> Forecast:
        """The next `steps` values of an evenly spaced series, the newest last. :param level: probability of the interval, such as 0.8."""
        ...


@attrs.frozen
class Expected:
    """One number that stands for the time ahead, and the interval around it."""

    mean: float
    low: float
    high: float


@attrs.frozen
class Outlook:
    """The load that a replica started now would meet: the peak of the forecast until it serves and one interval on."""

    rate: Expected
    prompt_tokens: Expected
    output_tokens: Expected
    by: str = ""
    """The predictor, for people."""
    horizon: float = 0.0
    """Seconds ahead that were looked at."""


# ------------------------------------------------------------------ the engine


class Performance(Protocol):
    """What one replica can do. Monotone: more work never takes less time."""

    @property
    def source(self) -> str:
        """Where the numbers are from, for people."""
        ...

    def prefill(self, tokens: float) -> float:
        """Seconds to read a prompt of so many uncached tokens, alone on a replica."""
        ...

    def itl(self, context: float, concurrency: float) -> float:
        """Seconds between tokens when so many sequences of mean length `context` are decoded together."""
        ...

    def most_sequences(self, context: float) -> float:
        """How many sequences of this length fit in one replica at once."""
        ...


# ------------------------------------------------------------------ decided


@attrs.frozen
class Limits:
    """What no decision goes beyond, whatever was proposed."""

    gpus: int | None = None
    """That all roles together may use."""
    minimum: Mapping[str, int] = attrs.field(factory=dict)
    maximum: Mapping[str, int] = attrs.field(factory=dict)
    max_step: int = 8
    """Replicas of one role that one decision adds or takes away."""
    patience: float = 180.0
    """Seconds for which fewer replicas must have been enough before they become fewer."""
    idle: float | None = None
    """Seconds without any demand after which nothing runs at all; None: never."""
    retry: float = 300.0
    """Seconds for which replicas that never started are not asked for again."""

    def least(self, role: str) -> int:
        return self.minimum.get(role, 1)

    def most(self, role: str) -> int | None:
        return self.maximum.get(role)


@attrs.frozen
class Unstarted:
    """Replicas of a role that never started, when that was seen last."""

    at: float
    count: int
    beside: int
    """How many there were that did start, or still might."""


@attrs.frozen
class View:
    """What every stage may look at."""

    at: float
    observation: Observation
    history: Sequence[Load]
    """One entry for each interval, the newest last."""
    roles: Sequence[str]
    performance: Performance | None
    predictor: Predictor
    """The one that the configuration chose, for whoever predicts."""
    ttft: float
    itl: float
    share: float
    """Of the requests that are to meet the targets."""
    limits: Limits
    interval: float
    cold_start: float
    """From the decision to a replica that serves."""
    wanted: Sequence[tuple[float, Targets]] = ()
    """What was reconciled at the ticks before, and when; the newest last."""
    unstarted: Mapping[str, Unstarted] = attrs.field(factory=dict)
    """By role, if there were any."""

    def replicas(self, role: str) -> int:
        """What is there or on its way."""
        return state.desired if (state := self.observation.fleet.get(role)) is not None else 0

    def gpus(self, role: str) -> int:
        return state.gpus_per_replica if (state := self.observation.fleet.get(role)) is not None else 1


@attrs.frozen
class Proposal:
    by: str
    kind: Literal["set", "at_least", "at_most"]
    targets: Targets
    """Of the roles that it has an opinion on."""
    why: Mapping[str, str] = attrs.field(factory=dict)
    """By role, one line."""


@attrs.frozen
class Constrained:
    targets: Targets
    why: Mapping[str, str] = attrs.field(factory=dict)
    """By role: why it is not what came in. Empty when nothing was changed."""


@runtime_checkable
class PredictStage(Protocol):
    stage: ClassVar[Literal["predict"]]

    def predict(self, view: View) -> Outlook | None:
        """Called once for each point that is added to `view.history`. None: nothing can be said yet."""
        ...


@runtime_checkable
class ProposeStage(Protocol):
    stage: ClassVar[Literal["propose"]]

    def propose(self, view: View, outlook: Outlook | None) -> Proposal | None: ...


@runtime_checkable
class ReconcileStage(Protocol):
    stage: ClassVar[Literal["reconcile"]]

    def reconcile(self, view: View, proposals: Sequence[Proposal]) -> Targets:
        """A target for every role of `view.roles`."""
        ...


@runtime_checkable
class ConstrainStage(Protocol):
    stage: ClassVar[Literal["constrain"]]

    def constrain(self, view: View, targets: Targets) -> Constrained: ...
