"""The stacks of this package by one word: `[router] use = "kv-plus"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.config.schema import Queue
from dynamo_kv_router.cost import KvCost
from dynamo_kv_router.plus import KvPlus

QUEUE = Queue(prefill_tokens=4096, wait_for="best", order="shortest", ageing=5000.0)
"""Requests wait for their best worker in the router and not in the engine, so that short ones pass, and late news changes their way."""


@attrs.frozen
class Kv(KvCost):
    """NVIDIA Dynamo's cost function, with all its weights and its defaults, tie-breaking and temperature included."""

    temperature: float = attrs.field(default=0.0, validator=v.ge(0))
    """Above zero, workers are drawn by softmax of the cost over its range."""
    needs = ()

    def stack(self) -> Mapping[str, Any]:
        weights = {a.name: getattr(self, a.name) for a in attrs.fields(KvCost)}
        return {
            "filters": ["taints", "adapter"],
            "scorers": [{"use": "kv-cost", **weights}],
            "facts": [{"use": "kv-index", "predict": 0.0}],
            "picker": {"use": "softmax", "temperature": self.temperature} if self.temperature else {"use": "best"},
        }


@attrs.frozen
class KvPlusPreset(KvPlus):
    """The least time, by prices that are learned from the engines while they work."""

    needs = ()

    def stack(self) -> Mapping[str, Any]:
        weights = {a.name: getattr(self, a.name) for a in attrs.fields(KvPlus)}
        return {"filters": ["taints", "adapter"], "scorers": [{"use": "kv-plus", **weights}], "queue": QUEUE}
