"""The conformance kit of discovery stores. Inherit it, provide `connect`, and run pytest.

    class TestMyStore(DiscoveryContract):
        @pytest.fixture
        def connect(self):
            return lambda: MyStore("127.0.0.1:1234", prefix=unique())

The guarantees, at length in docs/contracts/discovery.md: D1 values come back, D2 the present before the future, D3 nothing twice and
nothing lost, D4 dead leases expire, D5 revoking deletes at once, D6 an expired lease never comes back, D7 deleting nothing is silent,
D8 slow watchers cost a bounded amount, D9 an outage is an error and not an empty store.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, ClassVar

import pytest

from dynamo_core.discovery.contract import Change, Delete, Discovery, Lease, Put, Resync, Synced
from dynamo_core.errors import LeaseLost, StoreUnavailable

Connect = Callable[[], Discovery]


class DiscoveryContract:
    """Every test opens what it needs with `connect`, a fixture that returns a function: each call, one more store on the same backend.

    The backend must be empty at the start of each test. Set the attributes to what fits the store.
    """

    ttl: ClassVar[float] = 1.0
    """Seconds, of the leases in these tests: the shortest that the store keeps alive reliably."""
    patience: ClassVar[float] = 20.0
    """Seconds after which a test gives up waiting."""
    backlog: ClassVar[int] = 4096
    """How many changes the store keeps for a watcher that does not read."""

    def abandon(self, lease: Lease) -> None:
        """Stop keeping this lease alive, as `kill -9` of its owner would."""
        give_up: Any = getattr(lease, "abandon", None)
        assert give_up is not None, f"{type(lease).__name__} has no abandon(): override DiscoveryContract.abandon"
        give_up()

    def outage(self) -> AbstractAsyncContextManager[None] | None:
        """A context in which the backend is away, or `None` for a store that has no backend to lose."""
        return None

    # ------------------------------------------------------------------ keys and values

    async def test_d1_a_value_comes_back_byte_for_byte(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            for value in (b"", bytes(range(256)), b"\r\n\0 \xff", random.Random(1).randbytes(2**20)):
                await here.put("v1/values/it", value)
                assert await here.get("v1/values/it") == value
                assert await there.get("v1/values/it") == value
                assert await there.items("v1/values/") == {"v1/values/it": value}
            assert await here.get("v1/values/other") is None

    async def test_d1_items_are_those_that_begin_with_the_prefix(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            keys = ["a/b", "a/b/c", "a/bc", "a/c", "b", "A/b", "a%2Fb"]
            for key in keys:
                await here.put(key, key.encode())
            for prefix in ("a/b", "a/b/", "a/", "", "c"):
                assert await there.items(prefix) == {key: key.encode() for key in keys if key.startswith(prefix)}

    async def test_d1_every_printable_key_up_to_512_characters_is_a_key(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            keys = ["v1/" + "".join(map(chr, range(33, 127))), "v1/with space", "v1/..", ".", "v1/" + "x" * 509, "v1/" + "x" * 508 + "y", "v1/" + "/" * 509]
            for key in keys:
                await here.put(key, key.encode())
            assert await there.items("") == {key: key.encode() for key in keys}

    # ------------------------------------------------------------------ watching

    async def test_d2_a_watcher_sees_the_present_before_the_future(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            await here.put("w/1", b"one")
            await there.put("w/2", b"two")
            await here.put("x/3", b"elsewhere")
            async with there.watch("w/") as changes:
                await here.put("w/4", b"four")
                seen = [await self.next(changes) for _ in range(4)]
                present = seen[: seen.index(Synced())]
                told = {c.key: c.value for c in present if isinstance(c, Put)}
                told.pop("w/4", None)  # a store may take its picture a moment later
                assert told == {"w/1": b"one", "w/2": b"two"}
                assert sorted(c.key for c in seen if isinstance(c, Put)) == ["w/1", "w/2", "w/4"]

    async def test_d2_a_watcher_of_nothing_is_synced_at_once(self, connect: Connect) -> None:
        async with connect() as here, here.watch("nothing/") as changes:
            assert await self.next(changes) == Synced()
            await here.put("nothing/now", b"something")
            assert await self.next(changes) == Put("nothing/now", b"something", None)

    async def test_d2_changes_arrive_in_order_and_say_their_lease(self, connect: Connect) -> None:
        async with connect() as here, connect() as there, there.watch("w/") as changes:
            assert await self.next(changes) == Synced()
            lease = await here.lease()
            for i in range(20):
                await here.put(f"w/{i}", b"%d" % i, lease)
            assert [await self.next(changes) for _ in range(20)] == [Put(f"w/{i}", b"%d" % i, lease.id) for i in range(20)]
            await here.delete("w/7")
            assert await self.next(changes) == Delete("w/7")

    @pytest.mark.parametrize("seed", range(4))
    async def test_d3_whatever_happens_a_watcher_ends_up_with_the_present(self, connect: Connect, seed: int) -> None:
        dice = random.Random(seed)
        async with connect() as one, connect() as two:
            stores, keys = [one, two], [f"k/{i}" for i in range(5)]
            leases: list[tuple[Discovery, Lease]] = [(store, await store.lease()) for store in stores]
            async with two.watch("k/") as early:
                for step in range(40):
                    await self._something(dice, stores, leases, keys, step)
                async with one.watch("k/") as late:
                    for step in range(40, 80):
                        await self._something(dice, stores, leases, keys, step)
                    await one.put("k/end", b"end")
                    present = await one.items("k/")
                    assert await self.follow(early, until=present) == present
                    assert await self.follow(late, until=present) == present

    async def _something(self, dice: random.Random, stores: list[Discovery], leases: list[tuple[Discovery, Lease]], keys: list[str], step: int) -> None:
        which = dice.randrange(2)
        store, lease = leases[which]
        match dice.randrange(8):
            case 0 | 1:
                await store.delete(dice.choice(keys))
            case 2:
                await lease.revoke()
                leases[which] = (store, await store.lease())
            case 3 | 4:
                await store.put(dice.choice(keys), b"%d" % step)
            case _:
                await store.put(dice.choice(keys), b"%d" % step, lease)

    async def test_d3_each_of_many_puts_arrives_exactly_once(self, connect: Connect) -> None:
        async with connect() as one, connect() as two, connect() as three, three.watch("k/") as changes:
            assert await self.next(changes) == Synced()
            await asyncio.gather(*(store.put(f"k/{name}/{i}", b"v") for i in range(50) for name, store in (("one", one), ("two", two))))
            await one.put("k/end", b"v")
            keys: list[str] = []
            while "k/end" not in keys or len(keys) < 101:
                change = await self.next(changes)
                assert isinstance(change, Put)
                keys.append(change.key)
            assert sorted(keys) == sorted({*keys})
            assert {*keys} == {*(await two.items("k/"))}

    # ------------------------------------------------------------------ leases

    async def test_d4_a_lease_that_is_not_kept_alive_takes_its_keys_along(self, connect: Connect) -> None:
        async with connect() as here, connect() as there, there.watch("l/") as changes:
            assert await self.next(changes) == Synced()
            lease = await here.lease(self.ttl)
            await here.put("l/1", b"", lease)
            await here.put("l/2", b"")
            assert {(await self.next(changes)), (await self.next(changes))} == {Put("l/1", b"", lease.id), Put("l/2", b"")}
            self.abandon(lease)
            assert await self.next(changes) == Delete("l/1")
            assert await there.items("l/") == {"l/2": b""}
            await self.eventually(lambda: self._absent(here, "l/1"))

    async def test_d4_a_lease_that_is_kept_alive_stays(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            lease = await here.lease(self.ttl)
            await here.put("l/1", b"", lease)
            await asyncio.sleep(2 * self.ttl)
            assert await there.get("l/1") == b""
            assert not lease.lost.is_set()

    async def test_d4_a_key_belongs_to_the_lease_that_wrote_it_last(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            first, second = await here.lease(self.ttl), await there.lease()
            for key in ("l/taken", "l/freed", "l/kept"):
                await here.put(key, b"first", first)
            await there.put("l/taken", b"second", second)
            await there.put("l/freed", b"nobody")
            self.abandon(first)
            await self.eventually(lambda: self._absent(there, "l/kept"))
            assert await there.items("l/") == {"l/taken": b"second", "l/freed": b"nobody"}
            await second.revoke()
            assert await there.items("l/") == {"l/freed": b"nobody"}

    async def test_d5_revoking_a_lease_deletes_its_keys_at_once(self, connect: Connect) -> None:
        async with connect() as here, connect() as there, there.watch("l/") as changes:
            assert await self.next(changes) == Synced()
            lease, other = await here.lease(), await here.lease()
            await here.put("l/1", b"", lease)
            await here.put("l/2", b"", other)
            assert await self.next(changes) == Put("l/1", b"", lease.id)
            assert await self.next(changes) == Put("l/2", b"", other.id)
            await lease.revoke()
            assert await here.items("l/") == {"l/2": b""}
            assert await there.items("l/") == {"l/2": b""}
            assert await self.next(changes) == Delete("l/1")
            await lease.revoke()
            assert not lease.lost.is_set()

    async def test_d5_leaving_the_store_revokes_its_leases(self, connect: Connect) -> None:
        async with connect() as there:
            async with connect() as here:
                await here.put("l/1", b"", await here.lease())
                await here.put("l/2", b"")
                assert len(await there.items("l/")) == 2
            assert await there.items("l/") == {"l/2": b""}

    async def test_d6_an_expired_lease_never_comes_back(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            lease = await here.lease(self.ttl)
            assert 0 < lease.id < 2**63
            await here.put("l/1", b"", lease)
            self.abandon(lease)
            await asyncio.wait_for(lease.lost.wait(), self.patience)
            await self.eventually(lambda: self._absent(there, "l/1"))
            for key in ("l/1", "l/2"):
                with pytest.raises(LeaseLost):
                    await here.put(key, b"late", lease)
            await here.put("l/end", b"")
            assert await there.items("l/") == {"l/end": b""}
            fresh = await here.lease()
            assert fresh.id != lease.id
            await here.put("l/1", b"again", fresh)
            assert await there.get("l/1") == b"again"
            await lease.revoke()
            assert await there.get("l/1") == b"again"

    async def test_d6_a_revoked_lease_takes_no_more_keys(self, connect: Connect) -> None:
        async with connect() as here, connect() as there:
            lease = await here.lease()
            await lease.revoke()
            with pytest.raises(LeaseLost):
                await here.put("l/1", b"late", lease)
            assert await there.items("l/") == {}

    async def test_d7_deleting_an_absent_key_is_silent(self, connect: Connect) -> None:
        async with connect() as here, here.watch("k/") as changes:
            assert await self.next(changes) == Synced()
            await here.delete("k/never")
            await here.put("k/1", b"")
            await here.delete("k/1")
            await here.delete("k/1")
            await here.put("k/end", b"")
            seen = [await self.next(changes)]
            while seen[-1] != Put("k/end", b""):
                seen.append(await self.next(changes))
            assert seen[:-1] in ([Put("k/1", b""), Delete("k/1")], [Delete("k/1")], [])

    # ------------------------------------------------------------------ trouble

    async def test_d8_a_watcher_that_falls_behind_is_brought_back_to_the_present(self, connect: Connect) -> None:
        async with connect() as here, here.watch("k/") as changes:
            assert await self.next(changes) == Synced()
            for i in range(self.backlog + 100):
                await here.put(f"k/{i % 7}", b"%d" % i)
            present = await here.items("k/")
            read: list[Change] = []
            assert await self.follow(changes, until=present, read=read) == present
            assert len(read) <= self.backlog + len(present) + 2, "more was kept for a slow watcher than `backlog` says"
            await here.put("k/after", b"")
            assert await self.next(changes) == Put("k/after", b"")

    async def test_d8_a_watcher_that_goes_away_hurts_nobody(self, connect: Connect) -> None:
        async with connect() as here, here.watch("k/") as changes:

            async def watch_and_crash() -> None:
                async with here.watch("k/") as mine:
                    async for change in mine:
                        if change != Synced():
                            raise RuntimeError("a watcher crashed")

            crashing = asyncio.create_task(watch_and_crash())
            cancelled = asyncio.create_task(watch_and_crash())
            assert await self.next(changes) == Synced()
            cancelled.cancel()
            await here.put("k/1", b"")
            assert await self.next(changes) == Put("k/1", b"")
            results = await asyncio.wait_for(asyncio.gather(crashing, cancelled, return_exceptions=True), self.patience)
            assert {type(r) for r in results} <= {RuntimeError, asyncio.CancelledError}
            await here.put("k/2", b"")
            assert await self.next(changes) == Put("k/2", b"")

    async def test_d9_an_outage_is_an_error_and_not_an_empty_store(self, connect: Connect) -> None:
        outage = self.outage()
        async with connect() as here, here.watch("k/") as changes:
            assert await self.next(changes) == Synced()
            await here.put("k/1", b"")
            assert await self.next(changes) == Put("k/1", b"")
            assert here.problem() is None
            if outage is None:
                return
            async with outage:
                for call in (lambda: here.put("k/2", b""), lambda: here.get("k/1"), lambda: here.items("k/"), lambda: here.delete("k/1"), here.lease):
                    with pytest.raises(StoreUnavailable):
                        await asyncio.wait_for(call(), self.patience)
                assert here.problem()
                waiting = asyncio.ensure_future(anext(changes))
                done, _ = await asyncio.wait([waiting], timeout=1.0)
                assert not done, f"a watcher was told {waiting.result()} during an outage"
            await self.eventually(lambda: self._works(here))
            assert await here.get("k/1") == b""
            await here.put("k/2", b"")
            model: dict[str, bytes] = {"k/1": b""}
            change = await asyncio.wait_for(waiting, self.patience)
            while model.get("k/2") is None:
                apply(change, model)
                change = await self.next(changes) if model.get("k/2") is None else change
            assert here.problem() is None

    async def test_d9_a_watch_that_begins_in_an_outage_sees_the_present_when_it_ends(self, connect: Connect) -> None:
        outage = self.outage()
        if outage is None:
            return
        async with connect() as here:
            await here.put("k/1", b"")
            async with AsyncExitStack() as stack:
                async with outage:
                    changes = await stack.enter_async_context(here.watch("k/"))
                    waiting = asyncio.ensure_future(anext(changes))
                    done, _ = await asyncio.wait([waiting], timeout=0.5)
                    assert not done, f"a watcher was told {waiting.result()} during an outage"
                assert await asyncio.wait_for(waiting, self.patience) == Put("k/1", b"")
                assert await self.next(changes) == Synced()

    # ------------------------------------------------------------------ reading a watch

    async def next(self, changes: AsyncIterator[Change]) -> Change:
        return await asyncio.wait_for(anext(changes), self.patience)

    async def follow(self, changes: AsyncIterator[Change], *, until: Any, read: list[Change] | None = None) -> dict[str, bytes]:
        """What a watcher believes once it believes `until` and is synced. Nothing may be told twice."""
        model: dict[str, bytes] = {}
        synced = False
        told: set[Put] = set()
        while not (synced and model == until):
            change = await self.next(changes)
            if read is not None:
                read.append(change)
            if isinstance(change, Resync):
                model.clear()
                told.clear()
                synced = False
            elif isinstance(change, Synced):
                assert not synced, "Synced twice without a Resync"
                synced = True
            elif isinstance(change, Put):
                assert change not in told, f"told twice: {change}"
                told.add(change)
            else:
                assert synced, "a Delete before Synced"
                assert change.key in model or read is not None, f"a Delete of a key that is not there: {change.key}"
            apply(change, model)
        return model

    async def eventually(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(self.patience):
            while not await condition():  # noqa: ASYNC110 - the condition is in another process
                await asyncio.sleep(0.05)

    async def _absent(self, store: Discovery, key: str) -> bool:
        return await store.get(key) is None

    async def _works(self, store: Discovery) -> bool:
        try:
            await store.items("")
        except StoreUnavailable:
            return False
        return store.problem() is None


def apply(change: Change, model: dict[str, bytes]) -> None:
    """What a watcher's picture of the store becomes by this change."""
    match change:
        case Put(key, value):
            model[key] = value
        case Delete(key):
            model.pop(key, None)
        case Resync():
            model.clear()
        case Synced():
            pass
