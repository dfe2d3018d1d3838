"""The built-in scorers. All of them are on the unit scale: 1 for the worker that suits best, 0 for the one that suits least."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import BOOKED_BLOCKS, IN_FLIGHT, TAINTS, TURN


def highest_for_least(values: Sequence[float]) -> list[float]:
    """1 for the least value, 0 for the greatest, in proportion between; all 1 when they are alike."""
    low, high = min(values), max(values)
    if low == high:
        return [1.0] * len(values)
    span = high - low
    return [(high - x) / span for x in values]


@attrs.frozen
class Turn:
    """Prefers the worker whose turn is longest ago; by itself, with the picker `best`, that is round robin."""

    needs = (TURN,)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        return highest_for_least(fleet[TURN])


@attrs.frozen
class LeastLoad:
    """Prefers the worker with the fewest requests in progress; among equals, the one with the fewest KV blocks booked."""

    needs = (IN_FLIGHT, BOOKED_BLOCKS)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        blocks = fleet[BOOKED_BLOCKS]
        # Blocks count for less than one request however many they are, so that they only ever break ties.
        share = 1.0 / (max(blocks) + 1.0)
        return highest_for_least([sent + booked * share for sent, booked in zip(fleet[IN_FLIGHT], blocks, strict=True)])


@attrs.frozen
class PreferredTaints:
    """Prefers or avoids workers by taint, as the caller weighs them: above zero attracts, below zero repels."""

    needs = (TAINTS,)

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        if not (preferred := request.hints.preferred_taints):
            return [1.0] * len(fleet)
        worst = sum(w for w in preferred.values() if w < 0)
        span = sum(abs(w) for w in preferred.values()) or 1.0
        return [(sum(w for taint, w in preferred.items() if taint in taints) - worst) / span for taints in fleet[TAINTS]]
