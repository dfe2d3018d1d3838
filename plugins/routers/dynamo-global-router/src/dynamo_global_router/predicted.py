"""Strategy `predicted`: of the pools that are expected to meet the targets, the cheapest."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import validators as v

from dynamo_core.cards import Role
from dynamo_global_router.contract import Choice, PoolFacts, PoolName, PoolRequest

KNOWN = 20
"""Samples that make an estimate as good as it gets."""
SOONEST = 1 / 60
"""Share of the full time after which a pool that nothing is known of may be tried again."""


@attrs.define
class Predicted:
    """When no pool is expected to meet the targets, it is the one that comes closest; the record says so."""

    caution: float = attrs.field(default=1.0, validator=v.ge(0))
    """How many usual errors an estimate is raised by before it is held against its target."""
    refresh: float = attrs.field(default=60.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds after which a cheaper pool that seemed too slow is tried out by one request of no priority, sooner while few requests went there; 0: never."""
    retry: bool = True
    """When the pool fails before the first output, try the next best."""

    def bind(self, pools: Sequence[PoolName], role: Role) -> None:
        pass

    def choose(self, request: PoolRequest, pools: Sequence[PoolFacts]) -> Choice:
        ratios = [self._ratio(request, pool) for pool in pools]
        # By what it costs among those that do, by how far it is off among those that do not; names end ties.
        meeting = sorted((row for row, ratio in enumerate(ratios) if ratio <= 1.0), key=lambda row: (pools[row].cost, ratios[row], pools[row].name))
        missing = sorted((row for row, ratio in enumerate(ratios) if ratio > 1.0), key=lambda row: (ratios[row], pools[row].cost, pools[row].name))
        order = [*meeting, *missing]
        notes = {row: self._note(request, pools[row]) for row in range(len(pools))}
        if not meeting:
            kind, why = "closest", f"no pool is expected to meet the targets; it comes closest, at {ratios[order[0]]:.2f} times what is wanted"
        elif request.ttft_target_ms is None and request.itl_target_ms is None:
            kind, why = "cheapest", "the cheapest, as there are no targets"
        else:
            kind, why = "cheapest", f"the cheapest of {len(meeting)} that are expected to meet the targets"
        if (stale := self._stale(request, pools, order[0], missing)) is not None:
            order = [stale, *(row for row in order if row != stale)]
            kind, why = "refresh", f"cheaper than {pools[order[1]].name}, and not tried for {pools[stale].estimate.age_s:.0f} s: its estimate is tried out"
        return Choice(order if self.retry else order[:1], kind, why, notes)

    def _ratio(self, request: PoolRequest, pool: PoolFacts) -> float:
        """The worse of what is expected, in multiples of what is wanted; at most 1 when everything is met."""
        estimate = pool.estimate
        ratio = 0.0
        if request.ttft_target_ms is not None and request.role != "decode":
            ratio = estimate.ttft_ms * (1 + self.caution * estimate.ttft_error) / max(request.ttft_target_ms, 1e-3)
        if request.itl_target_ms is not None and request.role != "prefill":
            ratio = max(ratio, estimate.itl_ms * (1 + self.caution * estimate.itl_error) / max(request.itl_target_ms, 1e-3))
        return ratio

    def _note(self, request: PoolRequest, pool: PoolFacts) -> str:
        estimate, said = pool.estimate, list[str]()
        if request.ttft_target_ms is not None and request.role != "decode" and (
                ttft := estimate.ttft_ms * (1 + self.caution * estimate.ttft_error)) > request.ttft_target_ms:
            said.append(f"TTFT {ttft:.0f} > {request.ttft_target_ms:g} ms")
        if request.itl_target_ms is not None and request.role != "prefill" and (
                itl := estimate.itl_ms * (1 + self.caution * estimate.itl_error)) > request.itl_target_ms:
            said.append(f"ITL {itl:.1f} > {request.itl_target_ms:g} ms")
        return ", ".join(said) or "meets the targets"

    def _due(self, pool: PoolFacts) -> float:
        """Seconds after which it may be tried again: sooner while little is known of it."""
        return self.refresh * min(1.0, max(SOONEST, pool.estimate.samples / KNOWN))

    def _stale(self, request: PoolRequest, pools: Sequence[PoolFacts], best: int, missing: Sequence[int]) -> int | None:
        """A cheaper pool that was found too slow so long ago that it may have recovered."""
        if not self.refresh or request.priority > 0:
            return None
        stale = [row for row in missing if pools[row].cost < pools[best].cost and pools[row].estimate.age_s > self._due(pools[row])]
        return min(stale, key=lambda row: (-pools[row].estimate.age_s, pools[row].cost, pools[row].name)) if stale else None
