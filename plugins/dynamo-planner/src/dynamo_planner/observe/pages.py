"""What a worker's status endpoint says of its load, for workers that publish none because they have nothing to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import attrs
import httpx
from prometheus_client.parser import text_string_to_metric_families

from dynamo_core.discovery.contract import Discovery
from dynamo_core.errors import StoreUnavailable
from dynamo_core.httpx_client import HttpClient
from dynamo_core.runtime import names
from dynamo_core.types import Instance, Load

log = logging.getLogger("dynamo.planner")

_P = "dynamo_component_"


@attrs.define(eq=False)
class StatusPages:
    """Finds status endpoints in discovery."""

    discovery: Discovery
    namespace: str
    _client: httpx.AsyncClient = attrs.field(init=False, factory=lambda: HttpClient(timeout=2.0, trust_env=False))

    async def loads(self, instance: Instance, ranks: Sequence[int]) -> Mapping[int, Load]:
        """Its load by rank, read from its gauges; empty when it cannot be asked."""
        key = names.of_status(self.namespace, instance.component, instance.id)
        try:
            if (record := (await self.discovery.items(key)).get(key)) is None:
                return {}
            answer = await self._client.get(f"{record.decode().rstrip('/')}/metrics")
            answer.raise_for_status()
            return _loads(answer.text, ranks)
        except (StoreUnavailable, httpx.HTTPError, ValueError) as e:
            log.debug("the status of %s cannot be read: %s", instance.label, e)
            return {}

    async def close(self) -> None:
        await self._client.aclose()


def _loads(text: str, expected: Sequence[int]) -> dict[int, Load]:
    """A worker without requests has an idle engine, whatever that reported last or not at all."""
    ranks: dict[int, dict[str, float]] = {}
    in_flight, blocks = 0.0, 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            match sample.name.removeprefix(_P):
                case "inflight_requests":
                    in_flight += sample.value
                case "total_blocks":
                    blocks = sample.value
                case "engine_running" | "engine_waiting" | "kv_cache_usage" as name:
                    ranks.setdefault(int(sample.labels.get("dp_rank", 0)), {})[name] = sample.value
                case _:
                    pass
    if not in_flight:
        return {rank: Load(kv_total_blocks=int(blocks), dp_rank=rank) for rank in expected}
    return {rank: Load(int(seen.get("engine_running", 0)), int(seen.get("engine_waiting", 0)), int(seen.get("kv_cache_usage", 0.0) * blocks),
                       int(blocks), dp_rank=rank) for rank, seen in ranks.items()}
