"""What happens to streams through NATS when a process, the server, or the network to it does not do what it should."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys

import pytest

from dynamo_core.context import Context
from dynamo_core.errors import CannotConnect, Disconnected
from dynamo_core.testing.proxy import Proxy
from dynamo_nats.plane import NatsPlane

_numbers = itertools.count()
WORKER = """
import asyncio, sys
from dynamo_core.types import Output
from dynamo_nats.plane import NatsPlane

async def handler(endpoint, payload, context):
    for i in range(int(payload)):
        await asyncio.sleep(0.01)
        yield Output([i])

async def main():
    server = await NatsPlane(servers=(sys.argv[1],), prefix=sys.argv[2]).serve(handler, "")
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


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
    return lambda **options: NatsPlane(**{"servers": tuple(nats.servers), "prefix": prefix, **options})


@pytest.fixture
async def worker(make):
    """A worker in a process of its own: its address and its process."""
    plane = make()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, plane.servers[0], plane.prefix, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    address = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
    yield address, process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def test_a_killed_worker_ends_its_streams_within_seconds(make, worker) -> None:
    address, process = worker
    channel = await make().connect(address)
    streams = [channel.open("", b"100000", Context(f"s{i}")) for i in range(20)]
    for stream in streams:
        await stream.read()
    process.kill()
    await process.wait()
    async with asyncio.timeout(10):  # where a silent peer would take three times as long
        for stream in streams:
            with pytest.raises(Disconnected, match="gone from NATS"):
                while True:
                    await stream.read()
    assert channel.closed
    with pytest.raises(CannotConnect, match="nobody answers"):
        await make().connect(address)
    await channel.close()


@pytest.mark.slow
async def test_a_worker_that_stands_still_for_a_while_loses_nothing(make, worker, read_all) -> None:
    address, process = worker
    channel = await make().connect(address)
    stream = channel.open("", b"100", Context("s"))
    assert (await stream.read())[0].token_ids == [0]
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    got = await read_all(stream)
    assert got == list(range(100 - len(got), 100))
    await channel.close()


@pytest.mark.slow
async def test_a_worker_that_stands_still_for_good_is_given_up(make, worker) -> None:
    address, process = worker
    channel = await make(ping_interval=0.5, ping_timeout=1.0).connect(address)
    stream = channel.open("", b"100000", Context("s"))
    await stream.read()
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        with pytest.raises(Disconnected, match="did not answer a ping"):
            while True:
                await stream.read()
    os.kill(process.pid, signal.SIGCONT)
    await channel.close()


@pytest.mark.slow
async def test_a_caller_that_dies_closes_its_iterators(make, counting, eventually, nats) -> None:
    serving = make()
    server = await serving.serve(counting, "")
    code = """
import asyncio, sys
from dynamo_core.context import Context
from dynamo_nats.plane import NatsPlane

async def main():
    channel = await NatsPlane(servers=(sys.argv[1],), prefix=sys.argv[2]).connect(sys.argv[3])
    streams = [channel.open("paced", b"100000", Context(str(i))) for i in range(5)]
    await asyncio.Event().wait()

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, nats.servers[0], serving.prefix, server.address)
    await eventually(lambda: counting.serving == 5)
    process.kill()
    await process.wait()
    await eventually(lambda: counting.serving == 0)
    await server.close()


async def test_a_server_that_is_killed_and_returns_costs_a_pause_and_no_stream(nats, make, counting, read_all) -> None:
    server = await make().serve(counting, "")
    channel = await make().connect(server.address)
    streams = [channel.open("paced", b"150", Context(f"s{i}")) for i in range(30)]
    reading = [asyncio.create_task(read_all(stream)) for stream in streams]
    await asyncio.sleep(0.3)
    nats.kill()
    await asyncio.sleep(0.3)
    await asyncio.to_thread(nats.start)
    assert await asyncio.gather(*reading) == [list(range(150))] * 30
    await channel.close()
    await server.close()


@pytest.mark.parametrize("endpoint", ["count", pytest.param("paced", marks=pytest.mark.slow)])
async def test_connections_that_are_cut_again_and_again_lose_and_double_nothing(nats, make, counting, read_all, endpoint) -> None:
    async with Proxy.before(nats.servers[0]) as near, Proxy.before(nats.servers[0]) as far:
        server = await make(servers=(far.url_of(nats.servers[0]),)).serve(counting, "")
        channel = await make(servers=(near.url_of(nats.servers[0]),)).connect(server.address)
        n = 30_000 if endpoint == "count" else 120
        streams = [channel.open(endpoint, b"%d" % n, Context(f"s{i}")) for i in range(4)]
        reading = asyncio.gather(*(read_all(stream) for stream in streams))
        for proxy in (near, far, near, far):
            await asyncio.sleep(0.15)
            proxy.cut()
        assert await reading == [list(range(n))] * 4
        await channel.close()
        await server.close()


@pytest.mark.slow
async def test_a_slow_network_only_makes_it_slow(nats, make, counting, read_all) -> None:
    async with Proxy.before(nats.servers[0]) as proxy:
        server = await make().serve(counting, "")
        channel = await make(servers=(proxy.url_of(nats.servers[0]),)).connect(server.address)
        proxy.delay = 0.1
        streams = [channel.open("count", b"3000", Context(f"s{i}")) for i in range(3)]
        assert await asyncio.gather(*(read_all(stream) for stream in streams)) == [list(range(3000))] * 3
        proxy.delay = 0.0
        await channel.close()
        await server.close()


@pytest.mark.slow
async def test_a_caller_cut_off_from_nats_gives_up_and_so_does_the_worker(nats, make, counting, eventually) -> None:
    pings = {"ping_interval": 0.3, "ping_timeout": 0.6}
    async with Proxy.before(nats.servers[0]) as proxy:
        server = await make(**pings).serve(counting, "")
        channel = await make(servers=(proxy.url_of(nats.servers[0]),), **pings).connect(server.address)
        stream = channel.open("paced", b"100000", Context("s"))
        await stream.read()
        proxy.blackhole()
        async with asyncio.timeout(10):
            with pytest.raises(Disconnected):
                while True:
                    await stream.read()
        await eventually(lambda: counting.serving == 0)
        proxy.cut()
        await channel.close()
        await server.close()


@pytest.mark.parametrize("max_payload", [4096, 65536])
async def test_large_requests_and_answers_travel_in_pieces_that_the_server_allows(nats_server, max_payload) -> None:
    nats = nats_server(max_payload=max_payload, jetstream=False)
    body = os.urandom(3 * 2**20)

    async def echo(endpoint, payload, context):
        yield payload

    plane = NatsPlane(servers=tuple(nats.servers))
    server = await plane.serve(echo, "")
    channel = await plane.connect(server.address)
    stream = channel.open("", body, Context("s"))
    async with asyncio.timeout(30):
        assert await stream.read() == [body]
    await channel.close()
    await server.close()


async def test_connecting_without_nats_is_cannot_connect_within_the_timeout(make) -> None:
    plane = make(servers=("nats://127.0.0.1:9",), connect_timeout=1.0)
    with pytest.raises(CannotConnect, match=r"nats://127\.0\.0\.1:9 does not answer within 1 s"):
        await plane.connect("nats://dynamo.rpc.nobody.x")


async def test_closing_everything_leaves_nothing_running(make, counting, read_all) -> None:
    before = asyncio.all_tasks()
    server = await make().serve(counting, "")
    channel = await make().connect(server.address)
    assert await read_all(channel.open("count", b"5", Context("s"))) == list(range(5))
    await channel.close()
    await server.close()
    assert {task.get_name() for task in asyncio.all_tasks() - before if not task.done()} == set()


@pytest.mark.slow
async def test_losing_any_server_of_three_breaks_no_stream(nats_server, counting, read_all) -> None:
    cluster = nats_server(nodes=3, jetstream=False)
    planes = [NatsPlane(servers=(first, *cluster.servers), lost_after=3.0) for first in cluster.servers[:2]]
    server = await planes[0].serve(counting, "")
    channel = await planes[1].connect(server.address)
    for node in cluster.nodes:
        streams = [channel.open("paced", b"200", Context(f"s{i}")) for i in range(20)]
        reading = asyncio.gather(*(read_all(stream) for stream in streams))
        await asyncio.sleep(0.5)
        node.kill()
        assert await reading == [list(range(200))] * 20
        await asyncio.to_thread(cluster.start)
    await channel.close()
    await server.close()
