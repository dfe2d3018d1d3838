"""The `[planner]` table, and what it builds."""

# ruff: noqa: RUF009  (`choice` makes an attrs field)
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import validators as v

from dynamo_core.config import Secret, Use
from dynamo_core.config.schema import choice
from dynamo_planner.contract import Limits

Role = Literal["prefill", "decode", "aggregated"]


def _duration(default: float | None, **more: Any) -> Any:
    return attrs.field(default=default, metadata={"duration": True}, **more)


def _stages(*names: str) -> Any:
    return attrs.field(factory=lambda: tuple(Use(name) for name in names), metadata={"kind": "planner_stage"})


@attrs.frozen
class Metrics:
    """Where the load is read: a Prometheus server, or the frontends themselves."""

    prometheus: str | None = None
    """URL of a Prometheus server that scrapes the frontends."""
    selector: str = ""
    """More label matchers for the server's series, such as `namespace="prod"`."""
    frontends: tuple[str, ...] = ()
    """URLs of frontends (their operators' address where they have one)."""
    user: str | None = None
    """For basic authentication, with `password`."""
    password: Secret | None = None
    token: Secret | None = None
    """For bearer authentication."""
    ca: Path | None = None
    """Certificates to trust instead of the system's (PEM)."""
    cert: Path | None = None
    """A client certificate (PEM), with `key`."""
    key: Path | None = None
    """Its private key (PEM)."""
    timeout: float = _duration(5.0, validator=v.gt(0))
    """Seconds that an answer may take."""
    forget: float = _duration(300.0, validator=v.ge(0))
    """Seconds after which a frontend or one of its processes that is no longer shown counts as gone; until then its part is missing."""

    def __attrs_post_init__(self) -> None:
        if bool(self.prometheus) == bool(self.frontends):
            raise ValueError("name either the `prometheus` server or the `frontends`")
        if self.token is not None and self.user is not None:
            raise ValueError("either `token` or `user` and `password`, not both")
        if (self.user is None) != (self.password is None):
            raise ValueError("`user` and `password` belong together")
        if (self.cert is None) != (self.key is None):
            raise ValueError("`cert` and `key` belong together")


@attrs.frozen
class LearnAs:
    """Learn the performance of the engine while it serves, where there is no profile."""

    samples: int = attrs.field(default=8, validator=v.ge(4))
    """Intervals with traffic that are needed before anything is proposed."""
    window: int = attrs.field(default=500, validator=v.ge(8))
    """Intervals that are remembered."""


@attrs.frozen
class Planner:
    """Decides how many workers there are."""

    metrics: Metrics
    """Where the load is read."""
    connector: Use = choice("connector", "local")
    """Where it scales."""
    model: str | None = None
    """Only the series of this model; all, when unset. With `idle`, frontends hold requests for it before its first worker has run."""
    roles: tuple[Role, ...] = ("aggregated",)
    """The roles that are scaled: `aggregated`, or `prefill` and `decode`."""
    ttft: float = _duration(0.5, validator=v.gt(0))
    """Target of the time to the first token."""
    itl: float = _duration(0.05, validator=v.gt(0))
    """Target of the time between tokens."""
    share: float = attrs.field(default=0.95, validator=[v.gt(0), v.lt(1)])
    """Of the requests that are to meet the targets."""
    profile: Path | None = None
    """What one replica can do: a file of `dynamo profile`, or of Dynamo's profiler. Unset: learned from the fleet."""
    learn: LearnAs = attrs.field(factory=LearnAs)
    """How it is learned."""
    tick: float = _duration(10.0, validator=v.gt(0))
    """Seconds between decisions."""
    interval: float = _duration(60.0, validator=v.gt(0))
    """Seconds of one point of the history that is forecast; a multiple of `tick`."""
    history: int = attrs.field(default=11520, validator=v.ge(16))
    """Points of history that are kept."""
    cold_start: float = _duration(60.0, validator=v.ge(0))
    """Seconds from a decision to a replica that serves, until one was seen; then what was seen."""
    predictor: Use = choice("predictor", "kalman")
    """What the load will be."""
    predict: Use = choice("planner_stage", "forecast")
    """How the forecast is asked."""
    propose: tuple[Use, ...] = _stages("sla", "load")
    """Who proposes: `sla` plans ahead for the targets, `load` reacts; with both, the plan is the floor."""
    reconcile: Use = choice("planner_stage", "merge")
    """How proposals become one."""
    constrain: tuple[Use, ...] = _stages()
    """More constraints, before those of this table."""
    gpus: int | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """That all roles together may use."""
    minimum: Mapping[str, int] = attrs.field(factory=dict)
    """Replicas by role; 1 for a role that is not named."""
    maximum: Mapping[str, int] = attrs.field(factory=dict)
    """Replicas by role."""
    max_step: int = attrs.field(default=8, validator=v.ge(1))
    """Replicas of one role that one decision adds or takes away."""
    patience: float = _duration(180.0, validator=v.ge(0))
    """Seconds for which fewer replicas must have been enough before they become fewer."""
    retry: float = _duration(300.0, validator=v.ge(0))
    """Seconds for which replicas that never started are not asked for again, after they were taken back."""
    idle: float | None = _duration(None, validator=v.optional(v.gt(0)))
    """Seconds without demand after which nothing runs at all, until a request is held for a cold model. Unset: never."""
    dry_run: bool = False
    """Decide and record, and change nothing."""
    decisions: int = attrs.field(default=2048, validator=v.ge(1))
    """How many decisions are kept in memory."""
    record: Path | None = None
    """Write every decision to this file, as JSON lines."""
    record_bytes: int = attrs.field(default=64 * 2**20, validator=v.ge(4096))
    """Size at which the file is put aside as `.1`; two are kept."""
    stuck_after: int = attrs.field(default=10, validator=v.ge(2))
    """Decisions in a row that are held back alike, after which this is reported."""

    def __attrs_post_init__(self) -> None:
        if set(self.roles) not in ({"aggregated"}, {"prefill", "decode"}, {"prefill"}, {"decode"}):
            raise ValueError("`roles` are aggregated, or prefill and decode (or one of these two)")
        if self.interval < self.tick or abs(self.interval / self.tick - round(self.interval / self.tick)) > 1e-9:
            raise ValueError(f"`interval` ({self.interval:g} s) must be a multiple of `tick` ({self.tick:g} s)")
        for name, table in (("minimum", self.minimum), ("maximum", self.maximum)):
            if strange := set(table) - set(self.roles):
                raise ValueError(f"`{name}` names {', '.join(sorted(strange))}, and `roles` are {', '.join(self.roles)}")
            if any(count < 0 for count in table.values()):
                raise ValueError(f"`{name}` must not be negative")
        limits = self.limits()
        for role in self.roles:
            if (most := limits.most(role)) is not None and most < limits.least(role):
                raise ValueError(f"the maximum of {role} is {most} and its minimum {limits.least(role)}")

    def limits(self) -> Limits:
        return Limits(self.gpus, dict(self.minimum), dict(self.maximum), self.max_step, self.patience, self.idle, self.retry)
