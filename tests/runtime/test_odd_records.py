"""Records of the store that nobody can read."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_core.runtime import names
from dynamo_core.testing.cluster import Cluster, read_all


@pytest.mark.parametrize("value", [b"{", b'{"name": "\xff"}', b'{"zz": ' + b"[" * 100_000,
                                   b'{"name": "m", "block_size": 0}', b'{"name": "m", "dp_size": 1000000000}', b'{"name": "m", "dp_size": 0}'])
async def test_a_record_that_cannot_be_read_is_named_and_the_fleet_is_followed_on(value: bytes) -> None:
    async with Cluster.up(workers=1, engine="echo") as cluster:
        key = f"{names.models(cluster.config.namespace)}odd"
        runtime = cluster.members[0].runtime  # type: ignore[union-attr]
        await runtime.discovery.put(key, value)
        async with asyncio.timeout(20):
            while key not in str(cluster.catalog.problems()):
                await asyncio.sleep(0.01)
        await cluster.add()
        await cluster.wait_ready(2)
        assert (await read_all(await cluster.generate("hello", max_tokens=2)))[0]
