"""Peers that die without a word: real processes, stopped and killed."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from dynamo_core.context import Context
from dynamo_core.errors import Disconnected
from dynamo_core.transport.contract import Channel, Item, RequestPlane
from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.transport.tcp_client import TcpChannel
from dynamo_core.types import Output

GUARD = 30
WORKER = """
import asyncio, sys
from dynamo_core.transport.{module} import {plane}
from dynamo_core.types import Output

async def handler(endpoint, payload, context):
    i = 0
    while True:
        yield Output([i])
        i += 1
        await asyncio.sleep(0.01)

async def main():
    server = await {plane}(ping_interval=0.3, ping_timeout=20).serve(handler, "127.0.0.1")
    print(server.address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def worker(plane: str) -> AsyncIterator[tuple[int, str]]:
    """A worker process that streams one output every 10 ms: its id and its address."""
    script = WORKER.format(module=plane.lower(), plane=f"{plane.title()}Plane")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.pid, (await process.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


PLANES = {"tcp": TcpPlane(ping_interval=0.3, ping_timeout=0.7), "http": HttpPlane(ping_interval=0.3, ping_timeout=0.7)}


async def to_the_end(channel: Channel, expected: int) -> None:
    """Read in order until the stream ends with `Disconnected`."""
    stream = channel.open("x", b"", Context("q"))
    async with asyncio.timeout(GUARD):
        while True:
            try:
                items = await stream.read()
            except Disconnected:
                return
            assert items, "the stream ended silently"
            for item in items:
                assert isinstance(item, Output)
                assert item.token_ids == [expected]
                expected += 1


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_that_is_killed_or_stands_still_ends_its_streams_with_disconnected(name: str, how: signal.Signals) -> None:
    plane: RequestPlane = PLANES[name]
    async with worker(name) as (pid, address):
        channel = await plane.connect(address)
        readers = [asyncio.create_task(to_the_end(channel, 0)) for _ in range(5)]
        await asyncio.sleep(0.2)
        os.kill(pid, how)
        await asyncio.gather(*readers)
        await channel.close()


@pytest.mark.parametrize("name", PLANES)
async def test_a_worker_that_stands_still_for_a_moment_loses_nothing(name: str) -> None:
    plane = type(PLANES[name])(ping_interval=0.3, ping_timeout=20)
    async with worker(name) as (pid, address):
        channel = await plane.connect(address)
        stream = channel.open("x", b"", Context("q"))
        got: list[Item] = list(await stream.read())
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
        before = len(got)
        async with asyncio.timeout(GUARD):
            while len(got) < before + 30:
                got += await stream.read()
        assert [item.token_ids[0] for item in got if isinstance(item, Output)] == list(range(len(got)))
        stream.cancel()
        await channel.close()


@pytest.mark.parametrize("stood_still", [True, False])
async def test_a_process_that_stood_still_itself_does_not_blame_its_peer(stood_still: bool) -> None:
    async def handler(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        yield Output([0])

    server = await TcpPlane().serve(handler, "127.0.0.1")
    channel = await TcpPlane().connect(server.address)
    assert isinstance(channel, TcpChannel)
    now = asyncio.get_running_loop().time()
    channel._heard, channel._pinged, channel._next_tick = False, now - 100, now - 50 if stood_still else now
    channel._tick()  # as after a long stop: the timer runs before the answer, which has long arrived, is read
    assert channel.closed is not stood_still
    await channel.close()
    await server.close()


async def test_an_idle_connection_outlives_many_pings() -> None:
    async with worker("tcp") as (_, address):
        channel = await TcpPlane(ping_interval=0.05, ping_timeout=5).connect(address)
        await asyncio.sleep(0.6)
        assert not channel.closed
        assert await channel.open("x", b"", Context("q")).read()
        await channel.close()


async def test_a_worker_notices_that_its_caller_stands_still_for_good() -> None:
    closed = asyncio.Event()

    async def handler(endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        try:
            yield Output([0])
            await asyncio.Event().wait()
        finally:
            closed.set()

    server = await TcpPlane(ping_interval=0.2, ping_timeout=0.5).serve(handler, "127.0.0.1")
    script = ("import asyncio, os, signal, sys\nfrom dynamo_core.context import Context\nfrom dynamo_core.transport.tcp import TcpPlane\n"
              "async def main():\n channel = await TcpPlane().connect(sys.argv[1])\n await channel.open('x', b'', Context('q')).read()\n"
              " os.kill(os.getpid(), signal.SIGSTOP)\nasyncio.run(main())")
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, server.address)
    async with asyncio.timeout(GUARD):
        await closed.wait()
    process.kill()
    await process.wait()
    await server.close()
