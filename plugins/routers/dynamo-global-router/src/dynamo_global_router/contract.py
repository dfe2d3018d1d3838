"""How a pool is chosen: kind `pool_strategy`. A strategy sees what is known of a request and of each pool, and names pools in the order to try.

Pools that cannot take the request (gone, full, its needs not met) are left out before a strategy is asked, and degraded ones as long as others are
there. What a strategy answers is kept in the record of the decision.

    S1  `bind` is called once, before the first choice, with every pool that there will be; a strategy that cannot work with them raises `ConfigError`.
    S2  `choose` names at least one of the pools that it was given, by row, none twice. The first is the choice; the others are tried in turn, until
        the first output, when one before them fails. Pools that it does not name are not tried.
    S3  It is pure over its inputs: the same request and pools give the same answer, and nothing is written to. It neither waits nor does I/O.
    S4  The order of the rows means nothing: permuting them permutes the answer.

A strategy that raises, or answers nonsense, is left out for that request and counted; the request goes to the pools by rank, fastest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import attrs

from dynamo_core.cards import Role


@attrs.frozen
class PoolRequest:
    """What strategies may know about a request."""

    id: str
    role: Role = "aggregated"
    """`prefill`: only the prompt is read. `decode`: the prompt was read elsewhere. `aggregated`: both."""
    input_tokens: int = 0
    """Length of the prompt."""
    priority: int = 0
    """Higher is more urgent."""
    ttft_target_ms: float | None = None
    """Time to the first token that is wanted; the caller's, or the configured default. `None`: nobody said."""
    itl_target_ms: float | None = None
    """Time between tokens that is wanted."""
    expected_output_tokens: int | None = None


@attrs.frozen
class Estimate:
    """What a pool is expected to do for one request."""

    ttft_ms: float
    itl_ms: float
    ttft_error: float = 0.0
    """By which share such estimates are usually off, 0.2 is a fifth."""
    itl_error: float = 0.0
    samples: int = 0
    """Requests from which the rates behind it were learned; 0: configured, or assumed."""
    age_s: float = float("inf")
    """Seconds since the last of them."""


@attrs.frozen
class PoolFacts:
    """A pool as it is at this moment, for this request. Counts are of the worker that the pool's own router would choose now."""

    name: str
    rank: int
    """Lower is faster, by configuration."""
    cost: float
    """Of serving there, in any unit; by configuration."""
    workers: int = 1
    """That could take the request."""
    uncached_tokens: int = 0
    """Of the prompt; all of it when nobody in the pool knows what is cached."""
    backlog_tokens: int = 0
    """Uncached prompt tokens that the worker was sent before and has not read yet, those that wait in the pool's queue included."""
    sequences: int = 0
    """Requests that the worker has in progress."""
    max_sequences: int = 0
    """How many it runs at once; 0 when it does not say."""
    estimate: Estimate = Estimate(0.0, 0.0)


@attrs.frozen
class Choice:
    order: Sequence[int]
    """Rows of the pools to try, the chosen one first."""
    kind: str
    """One word for metrics: how it was chosen. Of few."""
    why: str
    """A sentence for people."""
    notes: Mapping[int, str] = attrs.field(factory=dict)
    """For each row, what speaks for or against it, where there is something to say."""


@attrs.frozen
class PoolName:
    """What is known of a pool before it is seen."""

    name: str
    rank: int
    cost: float


@runtime_checkable
class Strategy(Protocol):
    """Its options are the fields of the attrs class that implements it."""

    def bind(self, pools: Sequence[PoolName], role: Role) -> None:
        """These are the pools, and this is what they are asked for. :raises ConfigError: the strategy cannot work with them."""
        ...

    def choose(self, request: PoolRequest, pools: Sequence[PoolFacts]) -> Choice:
        """`pools` is never empty."""
        ...
