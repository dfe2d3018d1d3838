"""Records of a process, and leases that are lost at the wrong moment."""

from __future__ import annotations

import asyncio

from dynamo_core.config.schema import Config, Use
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.runtime import Runtime


async def test_a_record_that_meets_a_lost_lease_is_put_under_the_next_one() -> None:
    config = Config(discovery=Use("memory", {"name": "registering"}), request_plane=Use("in-process"), event_plane=Use("in-process", {"name": "registering"}))
    async with Runtime.open(config, Plugins.load()) as runtime:
        first = runtime.id
        await runtime.lease.revoke()
        runtime.lease.lost.set()
        await runtime.register("thing", lambda id: (f"v1/things/{id:016x}", b"here"))
        async with asyncio.timeout(10):
            while not (found := await runtime.discovery.items("v1/things/")):
                await asyncio.sleep(0.01)
        assert found == {f"v1/things/{runtime.id:016x}": b"here"}
        assert runtime.id != first
