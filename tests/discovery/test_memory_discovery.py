"""The in-process store keeps the contract, and what is particular to it."""

from __future__ import annotations

import pytest

from dynamo_core.contracts.discovery import DiscoveryContract
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.errors import StoreUnavailable


class TestMemoryDiscovery(DiscoveryContract):
    ttl = 0.3

    @pytest.fixture
    def connect(self):
        return MemoryDiscovery


async def test_stores_of_different_names_do_not_meet():
    async with MemoryDiscovery("one") as one, MemoryDiscovery("two") as two:
        await one.put("k", b"")
        assert await two.items("") == {}


async def test_a_store_is_forgotten_when_the_last_user_leaves():
    async with MemoryDiscovery() as store:
        await store.put("k", b"")
    async with MemoryDiscovery() as store:
        assert await store.items("") == {}


async def test_a_store_that_is_not_open_says_so():
    with pytest.raises(StoreUnavailable, match="not open"):
        await MemoryDiscovery().get("k")


@pytest.mark.parametrize("key", ["", "x" * 513, "tab\there", "ümlaut"])
async def test_a_key_that_is_none_is_refused_by_name(key):
    async with MemoryDiscovery() as store:
        with pytest.raises(ValueError, match="printable ASCII"):
            await store.put(key, b"")


async def test_a_value_over_a_mebibyte_is_refused():
    async with MemoryDiscovery() as store:
        with pytest.raises(ValueError, match="1048576 bytes"):
            await store.put("k", bytes(2**20 + 1))


async def test_a_watch_ends_when_its_store_is_left():
    async with MemoryDiscovery() as store:
        async with store.watch("") as changes:
            await store.__aexit__(None, None, None)
            assert [type(c).__name__ async for c in changes] == ["Synced"]
        await store.__aenter__()
