"""The ZeroMQ plane keeps the contract, in the clear and encrypted."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import asynccontextmanager

import pytest
import zmq
import zmq.asyncio

from dynamo_core.contracts.events import EventPlaneContract
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.errors import ConfigError
from dynamo_core.events import Event, EventContext, Gap, Left
from dynamo_core.events.zmq import ZmqEvents
from dynamo_core.events.zmq_wire import HEADER


class TestZmqEvents(EventPlaneContract):
    in_flight = 4 * EventPlaneContract.backlog  # in the sockets, when the machine is busy

    @pytest.fixture
    def make(self):
        return lambda: ZmqEvents(receive_queue=self.backlog)


class TestZmqEventsWithCurve(EventPlaneContract):
    in_flight = 4 * EventPlaneContract.backlog

    @pytest.fixture
    def make(self):
        secret = zmq.curve_keypair()[1].decode()
        return lambda: ZmqEvents(receive_queue=self.backlog, curve_secret_key=secret)


# ------------------------------------------------------------------ particular to ZeroMQ

PATIENCE = 30.0

PUBLISHER = """
import asyncio, sys
from pathlib import Path
from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.events import EventContext
from dynamo_core.events.zmq import ZmqEvents

async def main(path):
    async with FileDiscovery(Path(path), poll_interval=0.05) as store:
        lease = await store.lease(1.5)
        plane = ZmqEvents()
        await plane.start(EventContext(store, lease))
        publisher = await plane.publisher("t")
        print(lease.id, flush=True)
        while True:
            publisher.publish(b"x")
            await asyncio.sleep(0.01)

asyncio.run(main(*sys.argv[1:]))
"""


async def next_of(subscription):
    return await asyncio.wait_for(anext(subscription), PATIENCE)


@asynccontextmanager
async def started(discovery, **options):
    plane, lease = ZmqEvents(**options), await discovery.lease()
    await plane.start(EventContext(discovery, lease))
    try:
        yield plane, lease
    finally:
        await plane.stop()


@pytest.fixture
async def discovery():
    async with MemoryDiscovery("zmq-tests") as store:
        yield store


async def address_of(discovery):
    (advert,) = (await discovery.items("v1/events/")).values()
    return json.loads(advert)["address"]


async def test_a_killed_publisher_is_heard_until_then_and_leaves_when_its_lease_expires(tmp_path):
    async with FileDiscovery(tmp_path, poll_interval=0.05) as discovery, started(discovery) as (plane, _):
        subscription = await plane.subscribe("t")
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", PUBLISHER, str(tmp_path), stdout=asyncio.subprocess.PIPE)
        try:
            publisher = int(await asyncio.wait_for(child.stdout.readline(), PATIENCE))
            expected = None
            for _ in range(20):
                notice = await next_of(subscription)
                if isinstance(notice, Event):
                    assert expected in (None, notice.sequence)
                    expected = notice.sequence + 1
            assert expected
        finally:
            child.kill()
            await child.wait()
            child._transport.close()
        notice = await next_of(subscription)
        while isinstance(notice, Event | Gap):
            notice = await next_of(subscription)
        assert notice == Left(publisher, "t")


async def hears(socket, seconds=1.0):
    try:
        return await asyncio.wait_for(socket.recv_multipart(), seconds)
    except TimeoutError:
        return None


async def test_a_stranger_without_the_key_hears_nothing_and_says_nothing(discovery):
    key, other = (zmq.curve_keypair()[1].decode() for _ in range(2))
    async with started(discovery, curve_secret_key=key) as (writer, lease), started(discovery, curve_secret_key=key) as (reader, _):
        publisher = await writer.publisher("t")
        subscription = await reader.subscribe("t")
        address = await address_of(discovery)
        with zmq.asyncio.Context() as context:
            context.linger = 0
            plain, wrong = context.socket(zmq.SUB), context.socket(zmq.SUB)
            wrong.curve_publickey, wrong.curve_secretkey = zmq.curve_keypair()
            wrong.curve_serverkey = zmq.curve_public(other.encode())
            for stranger in (plain, wrong):
                stranger.subscribe(b"")
                stranger.connect(address)
            listening = [asyncio.ensure_future(hears(stranger)) for stranger in (plain, wrong)]
            for _ in range(20):
                publisher.publish(b"secret")
                await asyncio.sleep(0.05)
            assert await asyncio.gather(*listening) == [None, None]
            plain.close()
            wrong.close()
        assert (await next_of(subscription)).payload == b"secret"

        async with started(discovery, curve_secret_key=other) as (intruder, _), started(discovery) as (careless, _):
            for outsider in (intruder, careless):
                shouting = await outsider.publisher("t")
                for _ in range(10):
                    shouting.publish(b"lies")
                    await asyncio.sleep(0.02)
            publisher.publish(b"last")
            notice = await next_of(subscription)
            while not (isinstance(notice, Event) and notice.payload == b"last"):
                assert isinstance(notice, Event)
                assert notice.publisher == lease.id
                notice = await next_of(subscription)


async def test_publishers_that_never_answer_are_named(discovery, monkeypatch):
    monkeypatch.setattr("dynamo_core.events.publishers._SILENT", 0.0)
    lease = await discovery.lease()
    await discovery.put(f"v1/events/t/{lease.id:x}", b'{"address": "tcp://127.0.0.1:9"}', lease)
    async with started(discovery) as (plane, _):
        await plane.subscribe("t")
        assert "no answer from 1 of 1 publishers of t: tcp://127.0.0.1:9" in plane.problem()
        await discovery.delete(f"v1/events/t/{lease.id:x}")
        await asyncio.sleep(0.1)
        assert plane.problem() is None


@pytest.mark.parametrize("advert", [b"garbage", b"{}", b'{"address": "carrier-pigeon://home"}', b'{"address": 7}'])
async def test_an_unusable_advertisement_is_skipped_by_name(discovery, caplog, advert):
    await discovery.put("v1/events/t/7", advert)
    await discovery.put("v1/events/t/not-hex", advert)
    async with started(discovery) as (writer, _), started(discovery) as (reader, _):
        publisher = await writer.publisher("t")
        subscription = await reader.subscribe("t")
        publisher.publish(b"fine")
        assert (await next_of(subscription)).payload == b"fine"
    assert [record.key for record in caplog.records] == ["v1/events/t/7"]


async def test_garbage_from_a_publisher_is_dropped_and_said_once(discovery, caplog):
    lease = await discovery.lease()
    with zmq.asyncio.Context() as context:
        context.linger = 0
        garbage = context.socket(zmq.PUB)
        port = garbage.bind_to_random_port("tcp://127.0.0.1")
        await discovery.put(f"v1/events/t/{lease.id:x}", b'{"address": "tcp://127.0.0.1:%d"}' % port, lease)
        async with started(discovery) as (plane, _):
            subscription = await plane.subscribe("t")
            for _ in range(10):
                for frames in ([b"t\0"], [b"t\0", b"short"], [b"t\0", bytes(17), b""], [b"t\0more", bytes(16), b""], [b"t\0"] * 5):
                    await garbage.send_multipart(frames)
                await garbage.send_multipart([b"t\0", HEADER.pack(999, 0), b"under another name"])
                await asyncio.sleep(0.02)
            await garbage.send_multipart([b"t\0", HEADER.pack(lease.id, 0), b"fine"])
            assert await next_of(subscription) == Event(lease.id, 0, "t", b"fine")
        garbage.close()
    assert [record.getMessage() for record in caplog.records] == ["dropped a malformed event; further ones are dropped silently"]


async def test_garbage_from_a_subscriber_hurts_nobody(discovery):
    async with started(discovery) as (writer, _), started(discovery) as (reader, _):
        publisher = await writer.publisher("t")
        subscription = await reader.subscribe("t")
        host, port = (await address_of(discovery)).removeprefix("tcp://").split(":")
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(10_000), b"\xff" * 64):
            _, stream = await asyncio.open_connection(host, int(port))
            stream.write(garbage)
            await stream.drain()
            stream.close()
        with zmq.asyncio.Context() as context:
            context.linger = 0
            odd = context.socket(zmq.XSUB)
            odd.connect(f"tcp://{host}:{port}")
            for frame in (b"", b"\x01", b"\x01\xff\xff\0", b"\x02hello", b"\x01" + bytes(4000), b"\x01" + bytes(100_000)):
                await odd.send(frame)
            await asyncio.sleep(0.1)
            odd.close()
        assert publisher.publish(b"fine") == 0
        assert (await next_of(subscription)).payload == b"fine"


async def test_a_subscriber_that_comes_late_learns_of_its_gap_before_the_next_event(discovery):
    async with started(discovery) as (writer, lease), started(discovery) as (reader, _):
        publisher = await writer.publisher("t")
        for _ in range(5):
            publisher.publish(b"early")
        assert await next_of(await reader.subscribe("t")) == Gap(lease.id, "t", 5)


def test_the_key_is_checked_and_never_shown():
    secret = zmq.curve_keypair()[1].decode()
    assert secret not in repr(ZmqEvents(curve_secret_key=secret + "\n"))
    with pytest.raises(ValueError, match="'curve_secret_key' must be a CURVE secret key") as error:
        ZmqEvents(curve_secret_key="hunter2")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("bind", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_that_is_not_ours_is_an_error_that_names_the_option(discovery, bind):
    with pytest.raises(ConfigError, match=rf"cannot listen on .*{bind}(.|\n)*set event_plane.bind"):
        async with started(discovery, bind=bind) as (plane, _):
            await plane.publisher("t")


async def test_peers_are_told_the_host_and_not_the_address_that_is_listened_on(discovery):
    plane, lease = ZmqEvents(bind="0.0.0.0"), await discovery.lease()
    await plane.start(EventContext(discovery, lease, host="localhost"))
    await plane.publisher("t")
    assert (await address_of(discovery)).startswith("tcp://localhost:")
    async with started(discovery) as (reader, _):
        await reader.subscribe("t")
        assert reader.problem() is None
    await plane.stop()
