"""The conformance kit of event planes. Inherit it, provide `make`, and run pytest.

    class TestMyEvents(EventPlaneContract):
        @pytest.fixture
        def make(self):
            return lambda: MyEvents("127.0.0.1:4222", receive_queue=self.backlog)

The guarantees, at length in docs/contracts/event-plane.md: E1 in order and none twice, E2 losses are known, E3 publishers come and go,
E4 publishing never blocks, E5 the slow hurt nobody, E6 topics are separate, E7 a restart is a new identity.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar

from dynamo_core.discovery.contract import Discovery, Lease
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.events.contract import Event, EventContext, EventPlane, Gap, Left, Notice, Publisher, Subscription

Make = Callable[[], EventPlane]


class EventPlaneContract:
    """`make` is a fixture that returns a function: each call, one more unstarted plane, as in another process of the fleet.

    Every plane that it makes meets the others, and nobody else's. What subscribers keep is limited to `backlog` events.
    """

    backlog: ClassVar[int] = 200
    """Events that a subscription keeps for a reader that is behind. The planes that `make` returns are set to it."""
    in_flight: ClassVar[int] = 0
    """Events that the plane itself may keep on the way beyond that."""
    replays: ClassVar[int] = 0
    """Events of before a subscription that the plane still delivers to it. The planes that `make` returns are set to it."""
    patience: ClassVar[float] = 20.0
    """Seconds after which a test gives up waiting."""

    # ------------------------------------------------------------------ order and loss

    async def test_e1_events_arrive_in_order_and_none_twice(self, make: Make) -> None:
        async with self.fleet(make, 3) as (one, two, reader):
            subscription = await reader.plane.subscribe("ns/backend/kv")
            publishers = [await member.plane.publisher("ns/backend/kv") for member in (one, two)]
            other = await one.plane.publisher("ns/backend/load")
            got: dict[int, list[Event]] = {one.lease.id: [], two.lease.id: []}
            missed = 0
            for i in range(self.backlog // 4):
                for publisher in publishers:
                    assert publisher.publish(b"%d" % i) == i
                other.publish(b"elsewhere")
            while any(not events or events[-1].sequence < self.backlog // 4 - 1 for events in got.values()):
                for publisher, events in zip(publishers, got.values(), strict=True):
                    if not events:  # it may have been found late, and then only more events can tell
                        publisher.publish(b"more")
                notice = await self.next(subscription)
                assert not isinstance(notice, Left)
                if isinstance(notice, Event):
                    assert notice.topic == "ns/backend/kv"
                    got[notice.publisher].append(notice)
                else:
                    missed += notice.missed
            for events in got.values():
                numbers = [event.sequence for event in events]
                assert numbers == sorted({*numbers})
                assert all(event.payload in (b"%d" % event.sequence, b"more") for event in events)

    async def test_e1_any_payload_arrives_byte_for_byte(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            subscription = await reader.plane.subscribe("t")
            await self.meet(publisher, subscription)
            payloads = [b"", b"\0", bytes(range(256)), bytes(2**20)]
            for payload in payloads:
                publisher.publish(payload)
            assert [event.payload for event in await self.events(subscription, len(payloads))] == payloads

    async def test_e1_publishing_again_after_a_close_repeats_no_number(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            subscription = await reader.plane.subscribe("t")
            first = await writer.plane.publisher("t")
            last = await self.meet(first, subscription)
            await first.close()
            second = await writer.plane.publisher("t")
            assert second.publish(b"again") == last + 1
            third = await writer.plane.publisher("t")
            assert third.publish(b"beside") == last + 2

    async def test_e2_a_late_subscriber_is_told_what_it_missed(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            for _ in range(5):
                publisher.publish(b"early")
            subscription = await reader.plane.subscribe("t")
            await self.until_event(publisher, subscription, missed=5)

    async def test_e2_what_a_full_queue_dropped_is_announced_before_the_next_event(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            subscription = await reader.plane.subscribe("t")
            first = await self.meet(publisher, subscription) + 1
            total = 5 * self.backlog
            for i in range(total):
                publisher.publish(b"%d" % i)
                if i % 50 == 0:
                    await asyncio.sleep(0)
            expected = first
            lost = 0
            while expected < first + total:
                notice = await self.next(subscription)
                if isinstance(notice, Gap):
                    assert notice.publisher == writer.lease.id
                    assert notice.missed > 0
                    expected += notice.missed
                    lost += notice.missed
                    continue
                assert isinstance(notice, Event)
                assert notice.sequence == expected
                expected += 1
            assert lost <= total

    # ------------------------------------------------------------------ who is there

    async def test_e3_publishers_that_come_later_are_found_and_those_that_leave_are_dropped(self, make: Make) -> None:
        async with self.fleet(make, 3) as (one, two, reader):
            subscription = await reader.plane.subscribe("t")
            first = await one.plane.publisher("t")
            await self.meet(first, subscription)
            second = await two.plane.publisher("t")
            await self.meet(second, subscription)
            await first.close()
            assert await self.next(subscription) == Left(one.lease.id, "t")
            await self.meet(second, subscription)
            await two.plane.stop()
            assert await self.next(subscription) == Left(two.lease.id, "t")

    async def test_e3_a_publisher_stays_while_another_handle_of_it_is_open(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            subscription = await reader.plane.subscribe("t")
            first, second = await writer.plane.publisher("t"), await writer.plane.publisher("t")
            await first.close()
            await first.close()
            await self.meet(second, subscription)
            await second.close()
            assert await self.next(subscription) == Left(writer.lease.id, "t")

    # ------------------------------------------------------------------ limits

    async def test_e4_publishing_without_a_subscriber_neither_blocks_nor_keeps_anything(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            total = 5 * self.backlog
            assert [publisher.publish(b"x" * 100) for _ in range(total)] == list(range(total))
            await self.until_event(publisher, await reader.plane.subscribe("t"), missed=total)

    async def test_e4_over_the_limit_the_oldest_events_go_first(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            slow, fast = await reader.plane.subscribe("t"), await reader.plane.subscribe("t")
            await self.meet(publisher, slow)
            await self.meet(publisher, fast)
            last = await self._flood(publisher, fast)
            kept: list[int] = []
            while not kept or kept[-1] < last:
                notice = await self.next(slow)
                if isinstance(notice, Event):
                    kept.append(notice.sequence)
            assert len(kept) <= self.backlog + self.in_flight
            # What was still in flight may push out more while `slow` reads already: behind the last gap is a queue that was full.
            assert kept == sorted(set(kept))
            newest = kept[-self.backlog // 2 :] if self.in_flight else kept
            assert newest == list(range(newest[0], last + 1))

    async def test_e5_a_slow_subscriber_costs_the_others_nothing(self, make: Make) -> None:
        async with self.fleet(make, 3) as (writer, one, two):
            publisher = await writer.plane.publisher("t")
            for slow in (await one.plane.subscribe("t"), await two.plane.subscribe("t")):
                await self.meet(publisher, slow)
            fast = await two.plane.subscribe("t")
            await self.meet(publisher, fast)
            await self._flood(publisher, fast)

    async def test_e5_a_subscription_that_is_closed_ends(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            closed, kept = await reader.plane.subscribe("t"), await reader.plane.subscribe("t")
            await self.meet(publisher, closed)
            waiting = asyncio.create_task(self._drain(closed))
            await asyncio.sleep(0)
            await closed.close()
            assert await asyncio.wait_for(waiting, self.patience) == []
            await closed.close()
            await self.meet(publisher, kept)

    async def _drain(self, subscription: Subscription) -> list[Notice]:
        return [notice async for notice in subscription]

    async def _flood(self, publisher: Publisher, fast: Subscription) -> int:
        """Publish ten times the limit at a pace that `fast` follows; it must get every single event."""
        sequence = -1
        for _ in range(40):
            sent = [publisher.publish(b"flood") for _ in range(self.backlog // 4)]
            assert [event.sequence for event in await self.events(fast, len(sent))] == sent
            sequence = sent[-1]
        return sequence

    # ------------------------------------------------------------------ identity

    async def test_e6_topics_that_begin_alike_are_separate(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            topics = ["ns/kv", "ns/k", "ns/kv2", "ns/kv/deep", "ns/kv/1f", "ns", "NS/kv", "xns/kv"]
            publishers = [await writer.plane.publisher(topic) for topic in topics]
            subscriptions = [await reader.plane.subscribe(topic) for topic in topics]
            for publisher, subscription in zip(publishers, subscriptions, strict=True):
                await self.meet(publisher, subscription)
            for _ in range(5):
                for publisher, topic in zip(publishers, topics, strict=True):
                    publisher.publish(topic.encode())
            for subscription, topic in zip(subscriptions, topics, strict=True):
                events = await self.events(subscription, 5)
                assert {(event.topic, event.payload) for event in events} == {(topic, topic.encode())}

    async def test_e7_a_restarted_publisher_is_somebody_else_and_counts_from_0(self, make: Make) -> None:
        async with self.fleet(make, 2) as (writer, reader):
            subscription = await reader.plane.subscribe("t")
            await self.meet(await writer.plane.publisher("t"), subscription)
            await writer.plane.stop()
            assert await self.next(subscription) == Left(writer.lease.id, "t")
            async with self.member(make, reader.discovery) as again:
                assert again.lease.id != writer.lease.id
                publisher = await again.plane.publisher("t")
                assert publisher.publish(b"first") == 0
                notice = await self.next(subscription)
                while isinstance(notice, Gap):
                    publisher.publish(b"more")
                    notice = await self.next(subscription)
                assert isinstance(notice, Event)
                assert notice.publisher == again.lease.id

    async def test_stopping_leaves_no_task_behind(self, make: Make) -> None:
        before = asyncio.all_tasks()
        async with self.fleet(make, 2) as (writer, reader):
            publisher = await writer.plane.publisher("t")
            await self.meet(publisher, await reader.plane.subscribe("t"))
            await reader.plane.subscribe("other")
            assert reader.plane.problem() is None
        assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()
        assert publisher.publish(b"late") > 0

    # ------------------------------------------------------------------ tools

    @asynccontextmanager
    async def fleet(self, make: Make, size: int) -> AsyncGenerator[list[Member], None]:
        """So many started planes, each with its own lease."""
        async with MemoryDiscovery(name=f"events-kit-{id(make)}") as discovery, AsyncExitStack() as stack:
            yield [await stack.enter_async_context(self.member(make, discovery)) for _ in range(size)]

    @asynccontextmanager
    async def member(self, make: Make, discovery: Discovery) -> AsyncGenerator[Member, None]:
        plane, lease = make(), await discovery.lease()
        assert plane.guarantee in ("at-most-once", "at-least-once")
        await plane.start(EventContext(discovery, lease))
        try:
            yield Member(plane, discovery, lease)
        finally:
            await plane.stop()
            await lease.revoke()

    async def next(self, subscription: Subscription) -> Notice:
        return await asyncio.wait_for(anext(aiter(subscription)), self.patience)

    async def events(self, subscription: Subscription, count: int) -> list[Event]:
        """The next notices, which must all be events."""
        notices = [await self.next(subscription) for _ in range(count)]
        events = [notice for notice in notices if isinstance(notice, Event)]
        assert len(events) == count, [notice for notice in notices if not isinstance(notice, Event)]
        return events

    async def meet(self, publisher: Publisher, subscription: Subscription) -> int:
        """Publish until an event arrives, and read up to the last one. Returns its sequence number."""
        return await self.until_event(publisher, subscription, missed=None)

    async def until_event(self, publisher: Publisher, subscription: Subscription, *, missed: int | None) -> int:
        """The same; and every event from the first one on must be there or be covered by a `Gap`, of which `missed` by gaps (less what the plane keeps)."""
        last = publisher.publish(b"hello")
        known = -1
        told = 0
        async with asyncio.timeout(self.patience):
            reading = asyncio.ensure_future(anext(aiter(subscription)))
            while True:
                done, _ = await asyncio.wait([reading], timeout=0.1)
                if not done:
                    last = publisher.publish(b"hello?")
                    continue
                notice = reading.result()
                if missed is not None and isinstance(notice, Gap):
                    known += notice.missed
                    told += notice.missed
                elif missed is not None and isinstance(notice, Event):
                    assert notice.sequence == known + 1, f"after event {known} a late subscriber sees {notice}, and no Gap"
                    known = notice.sequence
                if isinstance(notice, Event) and notice.sequence == last:
                    if missed is not None:  # a plane that replays may also deliver what its store had not taken yet when the subscriber came
                        assert (0 if self.replays else missed - self.in_flight) <= told <= last
                    return last
                reading = asyncio.ensure_future(anext(aiter(subscription)))


class Member:
    """One process of the fleet, as far as events go."""

    def __init__(self, plane: EventPlane, discovery: Discovery, lease: Lease) -> None:
        self.plane = plane
        self.discovery = discovery
        self.lease = lease
