"""The options of the global router, apart from its strategy."""

from __future__ import annotations

import attrs
from attrs import validators as v

from dynamo_core.config import Router, Use


@attrs.frozen
class Rates:
    """How fast a worker of the pool is, until enough requests have shown it. The defaults are those of an 8B model on one data-centre GPU."""

    prefill_ms: float = attrs.field(default=20.0, validator=v.ge(0))
    """Milliseconds to the first token of an empty prompt on an idle worker."""
    prefill_ms_per_1000: float = attrs.field(default=20.0, validator=v.ge(0))
    """Milliseconds more for each thousand prompt tokens that are not cached."""
    itl_ms: float = attrs.field(default=8.0, validator=v.gt(0))
    """Milliseconds between the tokens of a request that is alone on a worker."""
    itl_ms_per_sequence: float = attrs.field(default=0.1, validator=v.ge(0))
    """Milliseconds more for each other request on it."""
    learn: bool = True
    """Off: the numbers above hold for ever."""


@attrs.frozen
class PoolSettings:
    """One pool: a namespace with workers of its own, routed by a stack of its own."""

    name: str = attrs.field(validator=v.matches_re(r"[A-Za-z0-9][A-Za-z0-9_.-]*"))
    """What decisions, metrics and the strategy call it."""
    namespace: str | None = attrs.field(default=None, validator=v.optional(v.matches_re(r"[a-z0-9][a-z0-9_-]*")))
    """Where its workers register; its name when unset."""
    discovery: Use | None = attrs.field(default=None, metadata={"kind": "discovery"})
    """A store of its own, instead of the one of this process."""
    rank: int | None = None
    """Lower is faster; by default, the pools are written fastest first."""
    cost: float = attrs.field(default=1.0, validator=v.ge(0))
    """Of serving there, in any unit that is the same for all pools: dollars an hour, GPUs a replica."""
    rates: Rates = attrs.field(factory=Rates)
    """How fast it is."""
    healthy_share: float = attrs.field(default=0.5, validator=[v.ge(0), v.le(1)])
    """With a smaller share of its workers in order, the pool counts as degraded."""
    router: Router = attrs.field(factory=Router)
    """Which of its workers serves a request: a [router] table as at the top of the file."""
