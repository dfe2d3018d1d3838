"""Scorer `kv-cost`: the cost function of NVIDIA Dynamo 1.6 with all its weights, in blocks; the score is the cost below zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import BLOCK_SIZE, BOOKED_PREFILL_TOKENS, IN_FLIGHT, OVERLAP_TOKENS, TAINTS
from dynamo_kv_router.facts import DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS, HOST_OVERLAP_TOKENS
from dynamo_kv_router.load_facts import POTENTIAL_BLOCKS
from dynamo_kv_router.taints import taint_factor


def _weight(default: float) -> Any:
    return attrs.field(default=default, validator=v.ge(0))


@attrs.frozen
class KvCost:
    """Prefers the worker with the least prefill to do, less what it has cached, and the fewest blocks in use.

        credit = overlap_credit * decay * device blocks + host_weight * host + disk_weight * disk + shared_weight * shared
        cost   = prefill_scale * max(0, prefill blocks - credit) + decode blocks + request_weight * requests
    """

    overlap_credit: float = _weight(1.0)
    """Of a prompt block in the worker's device cache."""
    credit_decay: float = _weight(0.0)
    """Above zero, workers with more prefill to do than the least busy one get less credit for what they hold."""
    prefill_scale: float = _weight(1.0)
    """Of a block to prefill, beside a block in use. 16 is far better than 1 where prompts are long."""
    request_weight: float = _weight(0.0)
    """Of a request in progress."""
    host_weight: float = _weight(0.75)
    """Of a prompt block in host memory."""
    disk_weight: float = _weight(0.25)
    """Of a prompt block on disk."""
    shared_weight: float = _weight(0.5)
    """Of a prompt block in a cache that workers share."""
    track_prefill: bool = True
    """Off: prefill costs nothing, and only blocks and requests count."""

    scale = "raw"
    needs = (
        BLOCK_SIZE, BOOKED_PREFILL_TOKENS, IN_FLIGHT, OVERLAP_TOKENS, HOST_OVERLAP_TOKENS, DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS,
        POTENTIAL_BLOCKS, TAINTS,
    )

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        size = _column(fleet[BLOCK_SIZE])
        device = _column(fleet[OVERLAP_TOKENS])
        blocks = _column(fleet[POTENTIAL_BLOCKS])
        busy = _column(fleet[BOOKED_PREFILL_TOKENS])
        credit = self.overlap_credit * device / size
        if self.credit_decay:
            request_blocks = np.maximum(1.0, np.ceil(request.prompt_tokens / size))
            credit /= 1.0 + self.credit_decay * ((busy - busy.min()) / size) / request_blocks
        for weight, fact in ((self.host_weight, HOST_OVERLAP_TOKENS), (self.disk_weight, DISK_OVERLAP_TOKENS), (self.shared_weight, EXTERNAL_OVERLAP_TOKENS)):
            if weight and any(held := fleet[fact]):
                credit += weight * _column(held) / size
        if request.role == "decode":
            cost = np.maximum(0.0, blocks - credit)
        else:
            cost = blocks
            if self.track_prefill:
                prefill = (busy + np.maximum(float(request.prompt_tokens), device)) / size
                cost = cost + self.prefill_scale * np.maximum(0.0, prefill - credit)
        if self.request_weight:
            cost = cost + self.request_weight * _column(fleet[IN_FLIGHT])
        if preferred := request.hints.preferred_taints:
            cost = cost * taint_factor(preferred, fleet[TAINTS])
        return -cost


def _column(values: Sequence[Any]) -> Any:
    return np.asarray(values, dtype=np.float64)
