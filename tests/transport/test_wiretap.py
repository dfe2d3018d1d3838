"""What somebody reads who records every byte between two processes: nothing of prompts, answers and events."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import zmq

from dynamo_core.context import Context
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.events import EventContext
from dynamo_core.events.zmq import ZmqEvents
from dynamo_core.testing.servers import Authority
from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tls import PlaneTls

PROMPT, ANSWER = b"the prompt that nobody else may read", b"the answer that nobody else may read"


@contextlib.asynccontextmanager
async def tapped(port: int):
    """A relay to `port`. Yields its own port, and what passed."""
    passed, tasks = bytearray(), set()

    async def carry(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                passed.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader, writer):
        there_reader, there = await asyncio.open_connection("127.0.0.1", port)
        for pair in ((reader, there), (there_reader, writer)):
            tasks.add(asyncio.create_task(carry(*pair)))

    relay = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield relay.sockets[0].getsockname()[1], passed
    finally:
        relay.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("make", [TcpPlane, HttpPlane])
async def test_requests_and_answers(make, secure, tmp_path):
    async def handler(endpoint, payload, context):
        yield ANSWER

    tls = None
    if secure:
        fleet = Authority(tmp_path)
        tls = PlaneTls(fleet.cert, *fleet.issue("worker"), require_client_cert=True)
    plane = make(tls=tls)
    server = await plane.serve(handler, "127.0.0.1")
    try:
        scheme, _, port = server.address.rpartition(":")
        async with tapped(int(port)) as (relay, passed):
            channel = await plane.connect(f"{scheme}:{relay}")
            stream = channel.open("e", PROMPT, Context("q"))
            assert list(await stream.read()) == [ANSWER]
            await channel.close()
            assert (PROMPT in passed, ANSWER in passed) == (not secure, not secure)
    finally:
        await server.close()


@pytest.mark.parametrize("secure", [True, False])
async def test_events(secure):
    secret = zmq.curve_keypair()[1].decode() if secure else None
    async with MemoryDiscovery(f"wiretap-{secure}") as there, MemoryDiscovery(f"wiretap-{secure}-relayed") as here:
        writer, reader = ZmqEvents(curve_secret_key=secret), ZmqEvents(curve_secret_key=secret)
        lease = await there.lease()
        await writer.start(EventContext(there, lease))
        await reader.start(EventContext(here, await here.lease()))
        try:
            publisher = await writer.publisher("t")
            (key, record), = (await there.items("v1/events/")).items()
            port = int(record.decode().rpartition(":")[2].partition('"')[0])
            async with tapped(port) as (relay, passed):
                await here.put(key, record.replace(str(port).encode(), str(relay).encode()), await here.lease())
                subscription = await reader.subscribe("t")
                events = aiter(subscription)
                waiting = asyncio.ensure_future(anext(events))
                async with asyncio.timeout(20):
                    while not waiting.done():
                        publisher.publish(ANSWER)
                        await asyncio.sleep(0.05)
                assert (await waiting).payload == ANSWER
                assert (ANSWER in passed) == (not secure)
                await subscription.close()
        finally:
            await reader.stop()
            await writer.stop()
