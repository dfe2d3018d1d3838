"""What an event plane costs: CPU microseconds per event in the publisher and in one subscriber, each its own process.

    python -m benchmarks.events [zmq|nats] [--events 20000] [--burst 10] [--pace 0.005] [--size 256] [--servers nats://...]

`--pace 0` publishes a burst in each turn of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import uvloop

from dynamo_core.discovery.file import FileDiscovery
from dynamo_core.events.contract import Event, EventContext, EventPlane
from dynamo_core.events.zmq import ZmqEvents

TOPIC = "bench/backend/kv"


def nats(options: argparse.Namespace) -> EventPlane:
    from dynamo_nats.events import NatsEvents

    return NatsEvents(servers=(options.servers,))


def zmq(_: argparse.Namespace) -> EventPlane:
    return cast(EventPlane, ZmqEvents())  # its guarantee is one of those that the contract names


PLANES: dict[str, Callable[[argparse.Namespace], EventPlane]] = {"zmq": zmq, "nats": nats}


@asynccontextmanager
async def member(options: argparse.Namespace) -> AsyncGenerator[EventPlane]:
    async with FileDiscovery(options.folder) as discovery:
        plane = PLANES[options.plane](options)
        await plane.start(EventContext(discovery, await discovery.lease()))
        try:
            yield plane
        finally:
            await plane.stop()


async def publish(options: argparse.Namespace) -> None:
    async with member(options) as plane:
        publisher = await plane.publisher(TOPIC)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        payload, before = bytes(options.size), time.process_time()
        for first in range(0, options.events, options.burst):
            for _ in range(min(options.burst, options.events - first)):
                publisher.publish(payload)
            await asyncio.sleep(options.pace)
        await asyncio.sleep(0.5)
        print(time.process_time() - before, flush=True)
        await asyncio.to_thread(sys.stdin.readline)


async def receive(options: argparse.Namespace, process: subprocess.Popen[str]) -> tuple[float, float]:
    """CPU seconds of the publisher and of the subscriber. :raises RuntimeError: an event did not arrive."""
    assert process.stdin is not None
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    async with member(options) as plane:
        subscription = await plane.subscribe(TOPIC)
        process.stdin.write("\n")
        process.stdin.flush()
        seen, before = 0, time.process_time()
        async for notice in subscription:
            if not isinstance(notice, Event):
                raise RuntimeError(f"not all arrived: {notice}")
            seen += 1
            if seen == options.events:
                break
        spent = time.process_time() - before
        served = float(await asyncio.to_thread(process.stdout.readline))
        await subscription.close()
    process.stdin.write("\n")
    process.stdin.flush()
    return served, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plane", nargs="?", choices=PLANES, default="zmq")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--burst", type=int, default=10)
    parser.add_argument("--pace", type=float, default=0.005)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--servers", default="nats://127.0.0.1:4222", help="of NATS")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.folder:
            runner.run(publish(options))
            return
        with tempfile.TemporaryDirectory() as folder:
            options.folder = Path(folder)
            command = [sys.executable, "-m", "benchmarks.events", *sys.argv[1:], "--folder", folder]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
                served, spent = runner.run(receive(options, process))
    sender, receiver = (seconds / options.events * 1e6 for seconds in (served, spent))
    if options.json:
        print(json.dumps({"sender_us": sender, "receiver_us": receiver, "count": options.events}))
    else:
        print(f"{options.plane}, {options.events} events of {options.size} bytes, {options.burst} each {options.pace:g} s: "
              f"publisher {sender:.2f} us, subscriber {receiver:.2f} us per event")


if __name__ == "__main__":
    main()
