"""The simplest use of the index: more of the prompt in the cache is better."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import OVERLAP_TOKENS


@attrs.frozen
class KvOverlap:
    """The share of the prompt that is in the worker's cache, 0 to 1."""

    needs = (OVERLAP_TOKENS,)
    scale = "unit"

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        share: Sequence[float] = np.asarray(fleet[OVERLAP_TOKENS], float) / max(1, request.prompt_tokens)  # pyright: ignore[reportAssignmentType]
        return share
