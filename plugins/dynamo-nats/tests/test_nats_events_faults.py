"""What happens to events through NATS when the server or the network does not do what it should: nothing is lost without a word."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from dynamo_core.events.contract import Event, Gap
from dynamo_core.testing.proxy import Proxy
from dynamo_nats.events import NatsEvents

GUARD = 30.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(nats_server):
    return nats_server()


@pytest.fixture
def nats(server):
    server.start()  # if the test before left it down
    return server


@pytest.fixture
def make(nats):
    prefix = f"faults-{next(_numbers)}"
    return lambda **options: NatsEvents(**{"servers": tuple(nats.servers), "prefix": prefix, **options})


@pytest.mark.parametrize("durable", [False, True])
async def test_publishing_goes_on_while_the_server_is_away(nats, make, member, discovery, account_for, eventually, durable) -> None:
    here, there = make(durable=durable), make(durable=durable)
    async with member(here, discovery), member(there, discovery):
        publisher = await here.publisher("t")
        subscription = await there.subscribe("t")
        for _ in range(50):
            publisher.publish(b"before")
        await account_for(subscription, 9)
        nats.kill()
        for _ in range(50):
            publisher.publish(b"meanwhile")
            await asyncio.sleep(0)
        await eventually(lambda: "no connection to NATS" in str(there.problem()))
        await asyncio.to_thread(nats.start)
        await eventually(lambda: here.problem() is None and there.problem() is None)
        for _ in range(50):
            publisher.publish(b"after")
        expected = 10
        async with asyncio.timeout(GUARD):
            while expected < 150:
                notice = await anext(aiter(subscription))
                if isinstance(notice, Gap):
                    assert not durable, "a durable plane loses nothing"
                    expected += notice.missed
                else:
                    assert isinstance(notice, Event)
                    assert notice.sequence == expected
                    expected += 1


@pytest.mark.parametrize("durable", [False, True])
async def test_a_subscriber_whose_connection_is_cut_learns_of_every_event(nats, make, member, discovery, account_for, durable) -> None:
    async with Proxy.before(nats.servers[0]) as proxy:
        here, there = make(durable=durable), make(durable=durable, servers=(proxy.url_of(nats.servers[0]),))
        async with member(here, discovery), member(there, discovery):
            publisher = await here.publisher("t")
            subscription = await there.subscribe("t")
            for i in range(300):
                publisher.publish(b"%d" % i)
                if i % 100 == 50:
                    proxy.cut()
                await asyncio.sleep(0.002)
            missed = await account_for(subscription, 299)
            assert not (durable and missed)


async def test_a_lost_last_event_is_known_without_a_further_one(nats, make, member, discovery) -> None:
    async with Proxy.before(nats.servers[0]) as proxy:
        here, there = make(), make(servers=(proxy.url_of(nats.servers[0]),))
        async with member(here, discovery), member(there, discovery):
            publisher = await here.publisher("t")
            subscription = await there.subscribe("t")
            publisher.publish(b"first")
            assert isinstance(await asyncio.wait_for(anext(aiter(subscription)), GUARD), Event)
            proxy.refusing = True
            proxy.cut()
            await asyncio.sleep(0.1)
            publisher.publish(b"lost")
            await asyncio.sleep(0.2)
            proxy.refusing = False
            notice = await asyncio.wait_for(anext(aiter(subscription)), GUARD)
            assert isinstance(notice, Gap)
            assert notice.missed == 1


async def test_a_late_subscriber_of_a_durable_topic_is_sent_what_it_missed(make, member, discovery, account_for) -> None:
    here, there = make(durable=True), make(durable=True)
    assert here.guarantee == "at-least-once"
    async with member(here, discovery), member(there, discovery):
        publisher = await here.publisher("t")
        payloads = [b"%d" % i for i in range(300)] + [bytes(3 * 2**20)]
        for payload in payloads:
            publisher.publish(payload)
        for _ in range(2):  # the second as well
            subscription = await there.subscribe("t")
            async with asyncio.timeout(GUARD):
                assert [(await anext(aiter(subscription))).payload for _ in payloads] == payloads


async def test_a_durable_stream_that_lost_its_data_goes_on_with_new_events(nats, make, member, discovery, eventually, account_for) -> None:
    here, there = make(durable=True), make(durable=True)
    async with member(here, discovery), member(there, discovery):
        publisher = await here.publisher("t")
        subscription = await there.subscribe("t")
        for _ in range(20):
            publisher.publish(b"before")
        await account_for(subscription, 19)
        nats.kill()
        nats.wipe()
        await asyncio.to_thread(nats.start)
        await eventually(lambda: here.problem() is None and there.problem() is None)
        assert publisher.publish(b"after") == 20
        async with asyncio.timeout(GUARD):
            assert await anext(aiter(subscription)) == Event((await anext_publisher(here)), 20, "t", b"after")


async def anext_publisher(plane: NatsEvents) -> int:
    assert plane._context is not None
    return plane._context.lease.id


async def test_garbage_and_events_of_who_is_not_registered_are_dropped(make, member, discovery, nats) -> None:
    import nats as client

    from dynamo_nats.events_wire import pieces

    here, there = make(), make()
    async with member(here, discovery), member(there, discovery):
        publisher = await here.publisher("t")
        subscription = await there.subscribe("t")
        stranger = await client.connect(nats.servers[0])
        for data in (b"", b"x", bytes(5), bytes(1000), *pieces(4711, 0, b"I am nobody", 1000)):
            await stranger.publish(f"{here.prefix}.events.t", data)
        await stranger.close()
        publisher.publish(b"mine")
        notice = await asyncio.wait_for(anext(aiter(subscription)), GUARD)
        assert isinstance(notice, Event)
        assert notice.payload == b"mine"


@pytest.mark.slow
@pytest.mark.parametrize("durable", [False, True])
async def test_losing_any_server_of_three_loses_no_event_without_a_word(nats_server, member, discovery, account_for, eventually, durable) -> None:
    cluster = nats_server(nodes=3)
    options = {"durable": durable, "replicas": 3 if durable else 1}
    here, there = (NatsEvents(servers=(first, *cluster.servers), **options) for first in cluster.servers[:2])
    async with member(here, discovery), member(there, discovery):
        publisher = await here.publisher("t")
        subscription = await there.subscribe("t")
        last = -1
        for node in cluster.nodes:
            for i in range(200):
                last = publisher.publish(b"x" * 100)
                if i == 100:
                    node.kill()
                await asyncio.sleep(0.005)
            await asyncio.to_thread(cluster.start)
            await eventually(lambda: here.problem() is None and there.problem() is None)
        missed = await account_for(subscription, last)
        assert not (durable and missed)
