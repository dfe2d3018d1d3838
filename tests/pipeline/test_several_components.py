"""Workers of one model under several names: routers hear the events of all of them."""

from __future__ import annotations

import asyncio

from dynamo_core.config.schema import Router, Use
from dynamo_core.routing.contract import RoutingRequest
from dynamo_core.routing.facts import ENGINE_REPORT_AGE
from dynamo_core.testing.cluster import Cluster, read_all

SIM = Use("sim", {"pace_ms": 1.0, "block_size": 16})


async def test_the_events_of_workers_with_another_name_arrive_too():
    async with Cluster.up(workers=1, engine=SIM, router=Router(filters=(Use("not-full"),)), settings={"name": "one"}) as cluster:
        await cluster.add(name="two")
        await cluster.wait_ready(2)
        router = cluster.model.dispatchers["aggregated"].router  # type: ignore[attr-defined]

        def heard() -> int:
            """Workers whose report is here."""
            load = next(part.component for part in router.providers if ENGINE_REPORT_AGE in part.component.provides)
            request = RoutingRequest(id="r", model=cluster.model.name, token_ids=[1], prompt_tokens=1)
            return sum(age < 1e6 for age in load.columns(request, router.workers)[ENGINE_REPORT_AGE])

        async with asyncio.timeout(20):
            while heard() < 2:
                await asyncio.gather(*[read_all(await cluster.generate(f"hello {i}", max_tokens=4)) for i in range(8)])
