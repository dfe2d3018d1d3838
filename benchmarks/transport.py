"""What the request plane costs: CPU microseconds per token in the caller and in the worker, each its own process.

    python benchmarks/transport.py [tcp|http|nats] [--streams 64] [--steps 400] [--pace 0.025] [--loop uvloop|asyncio] [--servers nats://...]

`--pace 0` runs flat out. Otherwise all streams get one token every `pace` seconds, as from one engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import uvloop

from dynamo_core.context import Context
from dynamo_core.transport.contract import Item, RequestPlane
from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.tcp import TcpPlane
from dynamo_core.types import Output


def nats(options: argparse.Namespace) -> RequestPlane:
    from dynamo_nats.plane import NatsPlane

    return NatsPlane(servers=(options.servers,))


PLANES: dict[str, Callable[[argparse.Namespace], RequestPlane]] = {"tcp": lambda _: TcpPlane(), "http": lambda _: HttpPlane(), "nats": nats}


class Steps:
    """An engine that gives each of its streams one token a step."""

    def __init__(self, streams: int, steps: int, pace: float) -> None:
        self.streams, self.steps, self.pace = streams, steps, pace
        self.waiting: list[asyncio.Future[None]] = []
        self.complete = asyncio.Event()
        self.left = streams

    async def generate(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        loop = asyncio.get_running_loop()
        for i in range(self.steps):
            turn = loop.create_future()
            self.waiting.append(turn)
            if len(self.waiting) == self.streams:
                self.complete.set()
            await turn
            yield Output([100_000 + i])

    async def run(self) -> float:
        """CPU seconds of the steps."""
        await self.complete.wait()
        before = time.process_time()
        for _ in range(self.steps):
            await self.complete.wait()
            self.complete.clear()
            if self.pace:
                await asyncio.sleep(self.pace)
            waiting, self.waiting = self.waiting, []
            for turn in waiting:
                turn.set_result(None)
        await asyncio.sleep(0.2)
        return time.process_time() - before


async def worker(options: argparse.Namespace) -> None:
    steps = Steps(options.streams, options.steps, options.pace)
    server = await PLANES[options.plane](options).serve(steps.generate, "127.0.0.1")
    print(server.address, flush=True)
    print(json.dumps(await steps.run()), flush=True)
    await server.close()


async def caller(options: argparse.Namespace, address: str) -> tuple[float, int]:
    """CPU seconds, and how many reads it took."""
    channel = await PLANES[options.plane](options).connect(address)
    reads = 0

    async def one(number: int) -> None:
        nonlocal reads
        stream = channel.open("generate", b"", Context(str(number)))
        left = options.steps
        while items := await stream.read():
            reads += 1
            left -= len(items)
        assert left == 0

    before = time.process_time()
    await asyncio.gather(*(one(i) for i in range(options.streams)))
    spent = time.process_time() - before
    await channel.close()
    return spent, reads


def run(main: Coroutine[Any, Any, Any], loop: str) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        return runner.run(main)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plane", nargs="?", choices=PLANES, default="tcp")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pace", type=float, default=0.025)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--servers", default="nats://127.0.0.1:4222", help="of NATS")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run(worker(options), options.loop)
        return
    with subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--worker"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        spent, reads = run(caller(options, process.stdout.readline().strip()), options.loop)
        served = json.loads(process.stdout.readline())
    tokens = options.streams * options.steps
    if options.json:
        print(json.dumps({"sender_us": served / tokens * 1e6, "receiver_us": spent / tokens * 1e6, "merged": tokens / reads, "count": tokens}))
        return
    print(f"{options.plane} on {options.loop}, {options.streams} streams, {options.steps} steps, pace {options.pace:g} s: "
          f"caller {spent / tokens * 1e6:.2f} us, worker {served / tokens * 1e6:.2f} us per token; {tokens / reads:.2f} tokens per read")


if __name__ == "__main__":
    main()
