"""Filter `kv-busy`: workers over a threshold take nothing more; when all are, the client is told to come back (529)."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import validators as v

from dynamo_core.routing.contract import Fleet, RoutingRequest
from dynamo_core.routing.facts import BOOKED_PREFILL_TOKENS, MAX_BATCHED_TOKENS, TOTAL_BLOCKS
from dynamo_kv_router.load_facts import ACTIVE_BLOCKS


@attrs.frozen
class KvBusy:
    """Drops workers that have enough to do, by what this router sent them."""

    blocks: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    """Share of a worker's KV blocks that requests in progress may hold."""
    prefill_tokens: int | None = attrs.field(default=None, validator=v.optional(v.ge(0)))
    """Uncached prompt tokens that may wait for their prefill."""
    prefill_share: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    """The same, as a share of the tokens that the engine takes in one step."""
    needs = (ACTIVE_BLOCKS, TOTAL_BLOCKS, BOOKED_PREFILL_TOKENS, MAX_BATCHED_TOKENS)
    busy = True

    def reject(self, request: RoutingRequest, fleet: Fleet) -> Mapping[int, str]:
        no: dict[int, str] = {}
        rows = zip(fleet[ACTIVE_BLOCKS], fleet[TOTAL_BLOCKS], fleet[BOOKED_PREFILL_TOKENS], fleet[MAX_BATCHED_TOKENS], strict=True)
        for i, (blocks, total, tokens, step) in enumerate(rows):
            if self.blocks is not None and total and blocks > self.blocks * total:
                no[i] = f"{blocks} of its {total} blocks are in use, limit {self.blocks:.0%}"
            elif self.prefill_tokens is not None and tokens > self.prefill_tokens:
                no[i] = f"{tokens} tokens wait for their prefill, limit {self.prefill_tokens}"
            elif self.prefill_share is not None and step and tokens > self.prefill_share * step:
                no[i] = f"{tokens} tokens wait for their prefill, limit {self.prefill_share:g} x {step}"
        return no
