"""CPU of the HTTP surface alone: a catalog in memory, no tokens, no planes. `python benchmarks/http_surface.py [--seconds 4]`.

The server runs in a process of its own; its CPU time is read from /proc around each phase. The client speaks raw HTTP/1.1 over
keep-alive connections and counts events, so that it costs little. `paced`: all streams in step, one event each per step, which is
what production looks like. `flat`: every delta is ready at once. `floor`: an ASGI app that sends the same bytes and does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from typing import Any

import uvloop

STREAMS, TOKENS, STEP = 64, 128, 0.02
WORD = " token"


class Clock:
    """Wakes every paced stream at once, as a decode step does."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[None]] = []

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            waiting, self.waiting = self.waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    def tick(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        return future


def catalog(clock: Clock, paced: bool, merge: int) -> Any:
    from dynamo_core.cards import ModelCard
    from dynamo_core.types import Delta, Usage

    class Generation:
        decisions = ("d1",)
        workers = ("w1",)
        prompt_logprobs = None

        def __init__(self, tokens: int) -> None:
            self.left, self.usage = tokens, Usage(20)

        async def read(self) -> Sequence[Delta]:
            if not self.left:
                return ()
            if paced:
                await clock.tick()
            n = min(merge, self.left)
            self.left -= n
            self.usage.completion_tokens += n
            return (Delta(0, WORD * n, [5] * n, None if self.left else "length"),)

        def cancel(self, reason: str = "") -> None: ...

    class Preprocessor:
        async def render(self, messages: Any, **options: Any) -> str:
            return messages[0]["content"]

        async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [5] * 20

    class Model:
        name, card, preprocessor, created = "m", ModelCard(name="m"), Preprocessor(), 0

        async def start(self, request: Any, text: Any, context: Any) -> Generation:
            return Generation(request.stops.max_tokens)

    class Catalog:
        def get(self, name: str, model: Model = Model()) -> Model:
            return model

    return Catalog()


def floor(clock: Clock, paced: bool, merge: int) -> Any:
    """The same bytes without any of our code."""
    event = (
        b'data: {"id":"chatcmpl-' + b"0" * 32 + b'","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":[{"index":0,"delta":{"content":'
    )
    event += json.dumps(WORD * merge).encode() + b'},"logprobs":null,"finish_reason":null}]}\n\n'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(0, TOKENS, merge):
            if paced:
                await clock.tick()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    return app


def serve(which: str, kind: str, paced: bool, merge: int, pipe: Any) -> None:
    from prometheus_client import CollectorRegistry

    from dynamo_core.config.schema import Frontend
    from dynamo_core.frontend.app import create_app
    from dynamo_core.frontend.metrics import HttpMetrics
    from dynamo_core.frontend.servers.hypercorn import HypercornServer
    from dynamo_core.frontend.servers.uvicorn import UvicornServer

    async def main() -> None:
        clock = Clock()
        ticking = asyncio.create_task(clock.run())
        app = floor(clock, paced, merge) if kind == "floor" else create_app(Frontend(), catalog(clock, paced, merge), metrics=HttpMetrics(CollectorRegistry()))
        server = {"hypercorn": HypercornServer, "uvicorn": UvicornServer}[which]()
        await server.serve(app, host="127.0.0.1", port=0, tls=None, stop=asyncio.Event(), on_listening=pipe.send, drain_timeout=1)
        ticking.cancel()

    uvloop.run(main())


class Client(asyncio.Protocol):
    """One closed loop on one connection."""

    def __init__(self, body: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        self.until, self.done = until, done
        self.requests = self.events = 0
        self.tail = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        self.tail = (self.tail + data)[-64:]
        if self.tail.endswith(b"\r\n0\r\n\r\n"):
            assert b"[DONE]" in self.tail, self.tail
            self.tail = b""
            self.requests += 1
            if time.monotonic() < self.until:
                self.transport.write(self.request)
            else:
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed by the server"))


def cpu(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port: int, seconds: float, tokens: int) -> tuple[int, int]:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": tokens}).encode()
    loop = asyncio.get_running_loop()
    until = time.monotonic() + seconds
    clients: list[Client] = []
    for _ in range(STREAMS):
        client = Client(body, until, loop.create_future())
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    for client in clients:
        client.transport.close()
    return sum(c.requests for c in clients), sum(c.events for c in clients)


def measure(which: str, kind: str, paced: bool, merge: int, tokens: int, seconds: float) -> tuple[float, float]:
    """CPU us per request and per event."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(which, kind, paced, merge, theirs), daemon=True)
    process.start()
    try:
        port = ours.recv()
        uvloop.run(load(port, 0.5, tokens))
        before = cpu(process.pid or 0)
        requests, events = uvloop.run(load(port, seconds, tokens))
        used = cpu(process.pid or 0) - before
        return used / requests * 1e6, used / events * 1e6
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    print("| server | scenario | floor us/request | us/event | ours us/request | us/event | added per event |")
    print("|---|---|---|---|---|---|---|")
    for which in ("hypercorn", "uvicorn"):
        for name, paced, merge, tokens in (
            ("paced, 1 token an event", True, 1, TOKENS),
            ("flat, 8 tokens an event", False, 8, TOKENS),
            ("one event a request", False, TOKENS, TOKENS),
        ):
            base = measure(which, "floor", paced, merge, tokens, options.seconds)
            full = measure(which, "ours", paced, merge, tokens, options.seconds)
            print(f"| {which} | {name} | {base[0]:.0f} | {base[1]:.1f} | {full[0]:.0f} | {full[1]:.1f} | {full[1] - base[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
