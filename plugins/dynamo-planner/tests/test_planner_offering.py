"""Models that nothing serves, and that a planner would start workers of."""

from __future__ import annotations

from dynamo_core.runtime import names
from dynamo_core.testing.cluster import Cluster
from dynamo_planner.offering import Offering


async def offered(cluster: Cluster) -> set[str]:
    return {key.split("/")[3] for key in await cluster.catalog._runtime.discovery.items(names.cold("dynamo"))}


async def test_what_has_run_is_offered_when_nothing_runs_and_no_more_when_the_planner_ends():
    async with Cluster.up(workers=1) as cluster:
        offering = Offering(cluster.catalog._runtime, None)
        await offering.look()
        await cluster.drain(0)
        await offering.look()
        assert await offered(cluster) == {"echo"}
        await offering.close()
        assert await offered(cluster) == set()


async def test_a_planner_for_one_model_offers_it_before_it_has_run_and_no_other():
    async with Cluster.up(workers=1) as cluster:
        offering = Offering(cluster.catalog._runtime, "chat")
        await offering.look()
        assert await offered(cluster) == {"chat"}
        await offering.close()
