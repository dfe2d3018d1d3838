"""Scorer `kv-plus`: milliseconds. What the request would wait, cost, and make others wait on each worker; the score is that below zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import BLOCK_SIZE, OVERLAP_TOKENS, TAINTS, TOTAL_BLOCKS
from dynamo_kv_router.facts import DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS, HOST_OVERLAP_TOKENS
from dynamo_kv_router.load_facts import (
    ACTIVE_OVERLAP_TOKENS,
    ATTENTION_MS,
    BACKLOG,
    CONTEXT,
    DECODE_MS,
    DECODING,
    GENERATED,
    OUTPUT_TOKENS,
    PASS_MS,
    POTENTIAL_BLOCKS,
    PREFILL_MS,
    RECENT,
    SEQUENCE_MS,
    STEP_MS,
)
from dynamo_kv_router.taints import taint_factor

LEAST_OUTPUT = 300.0
"""Answers count as at least so long when context is weighed: where they are shorter, the same conversations come back all the sooner."""
FULL = 0.97
"""Share of the KV cache beyond which engines hold requests back."""


def _weight(default: float) -> Any:
    return attrs.field(default=default, validator=v.ge(0))


@attrs.frozen
class KvPlus:
    """Prefers the worker on which the request costs least time, its own and that of others.

        work = prefill of the tokens that are not cached there, as learned from the engines
        cost = backlog_weight * backlog + work * (1 + work_weight + slowdown_weight * decoding)
               + decode_weight * output * step cost of the context
               + recent_weight * work without a cache * what was sent there of late, over the mean
               + memory_weight * time until enough of the KV cache is free
    """

    backlog_weight: float = _weight(3.0)
    """Of the time for which others prefill there first. Above 1, requests rather wait in the router's queue, where short ones pass and news counts."""
    work_weight: float = _weight(1.2)
    """Of the work beyond the time that it takes: it delays requests that are yet to come, and fills a cache."""
    slowdown_weight: float = _weight(0.1)
    """Of the same work, for each request that decodes there and is delayed by it. Above this, answers end sooner and start later."""
    decode_weight: float = _weight(0.05)
    """Of the decode time that the request will spend, and costs others, because of the context on the worker."""
    recent_weight: float = _weight(0.5)
    """Of the prefill of the whole prompt, for a worker that was sent as much as others of late; above that, more. What comes again spreads."""
    memory_weight: float = _weight(3.0)
    """Of the time for which the request would wait for others to end, where what is in use of the KV cache leaves too little for it."""
    host_weight: float = _weight(0.75)
    """Share of its prefill that a token in host memory saves."""
    disk_weight: float = _weight(0.25)
    """Share of its prefill that a token on disk saves."""
    external_weight: float = _weight(0.25)
    """Share of its prefill that a token in storage outside of the worker saves."""

    scale = "raw"
    needs = (
        OVERLAP_TOKENS, HOST_OVERLAP_TOKENS, DISK_OVERLAP_TOKENS, EXTERNAL_OVERLAP_TOKENS, ACTIVE_OVERLAP_TOKENS, BACKLOG, RECENT, DECODING, CONTEXT,
        PASS_MS, PREFILL_MS, ATTENTION_MS, SEQUENCE_MS, DECODE_MS, OUTPUT_TOKENS, TAINTS, GENERATED, POTENTIAL_BLOCKS,
        STEP_MS, BLOCK_SIZE, TOTAL_BLOCKS,
    )

    def score(self, request: RoutingRequest, fleet: Fleet) -> Sequence[float]:
        prompt = float(request.prompt_tokens)
        cached = np.maximum(_column(fleet[OVERLAP_TOKENS]), _column(fleet[ACTIVE_OVERLAP_TOKENS]))
        for weight, fact in ((self.host_weight, HOST_OVERLAP_TOKENS), (self.disk_weight, DISK_OVERLAP_TOKENS), (self.external_weight, EXTERNAL_OVERLAP_TOKENS)):
            if weight and any(held := fleet[fact]):
                cached = cached + weight * _column(held)
        # An engine computes the last token of a prompt always.
        uncached = np.maximum(1.0, prompt - cached)
        prefill, attention = _column(fleet[PREFILL_MS]), _column(fleet[ATTENTION_MS])
        work = _column(fleet[PASS_MS]) + uncached * (prefill + attention * (prompt - 0.5 * uncached))
        decoding = _column(fleet[DECODING])
        cost = self.backlog_weight * _column(fleet[BACKLOG]) + work * (1.0 + self.work_weight + self.slowdown_weight * decoding)
        if self.decode_weight and request.role != "prefill":
            output = np.maximum(LEAST_OUTPUT, self._output(request, _column(fleet[OUTPUT_TOKENS])))
            step = _column(fleet[DECODE_MS]) * (_column(fleet[CONTEXT]) + 0.5 * decoding * prompt) + _column(fleet[SEQUENCE_MS]) * decoding * 1.5
            cost = cost + self.decode_weight * output * step
        if self.recent_weight:
            recent = _column(fleet[RECENT])
            whole = prompt * (prefill + 0.5 * prompt * attention)
            # Whoever is alone in the fleet keeps its worker, however often it asks: what it has sent of late is hardly more than its prompt.
            cost = cost + self.recent_weight * recent * whole / np.maximum(recent.mean() + whole, 1e-9)
        if self.memory_weight:
            cost = cost + self.memory_weight * self._memory_wait(fleet)
        if preferred := request.hints.preferred_taints:
            cost = cost * taint_factor(preferred, fleet[TAINTS])
        return -cost

    def _memory_wait(self, fleet: Fleet) -> Any:
        """Milliseconds. Requests give back their blocks when they end, in the time that an answer takes."""
        size = _column(fleet[BLOCK_SIZE])
        capacity = FULL * size * _column(fleet[TOTAL_BLOCKS])
        excess = np.where(capacity > 0, np.maximum(0.0, size * _column(fleet[POTENTIAL_BLOCKS]) + _column(fleet[GENERATED]) - capacity), 0.0)
        if not excess.any():
            return 0.0
        context = _column(fleet[CONTEXT])
        step = _column(fleet[STEP_MS]) + _column(fleet[SEQUENCE_MS]) * _column(fleet[DECODING]) + _column(fleet[DECODE_MS]) * context
        return excess / np.maximum(1.0, context) * _column(fleet[OUTPUT_TOKENS]) * step

    def _output(self, request: RoutingRequest, mean: Any) -> Any:
        if (expected := request.hints.expected_output_tokens) is not None:
            return float(expected)
        return mean if request.max_tokens is None else np.minimum(mean, float(request.max_tokens))


def _column(values: Sequence[Any]) -> Any:
    return np.asarray(values, dtype=np.float64)
