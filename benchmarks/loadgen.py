"""A closed loop of clients, cheap enough not to be what is measured: raw HTTP/1.1 on uvloop and httptools.

Every answer is checked: status 200, `[DONE]` at the end, a finish reason, some text, and exactly the tokens that were asked for.
Anything else is an error, by kind. A phase starts and ends with nothing in flight, so CPU per request is exact.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import gc
import itertools
import json
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import httptools
import uvloop

from benchmarks import procstat
from benchmarks.model import words

DRAIN = 30.0
"""Seconds that the answers in flight have to end."""
_TEXT = re.compile(rb'"(?:content|text)":\s*"[^"]')
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d+)')
_FINISH = re.compile(rb'"finish_reason":\s*"')
_USAGE_FROM_END = 1500
"""Bytes before the end in which usage is looked for."""


class Prompts:
    """Request bytes. Each prompt is a number of its own and a stretch of a long text from anywhere in it, so that neither a beginning nor
    a paragraph is seen twice; single words are."""

    def __init__(self, port: int, model: str, count: int, max_tokens: int, stream: bool, seed: int) -> None:
        self._dice = dice = random.Random(seed)
        options: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
        if stream:
            options["stream_options"] = {"include_usage": True}
        self._head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\ncontent-length: "
        self._tail = '"}],' + json.dumps(options)[1:]
        chosen = dice.choices(words(), k=40 * count)
        self._text = " ".join(chosen)
        starts = [0, *itertools.accumulate(len(word) + 1 for word in chosen)]
        self._stretches = [(starts[i], starts[i + count] - 1) for i in range(len(chosen) - count)]

    def next(self) -> bytes:
        start, end = self._dice.choice(self._stretches)
        body = f'{{"messages":[{{"role":"user","content":"{self._dice.randrange(10**6, 10**7)} {self._text[start:end]}{self._tail}'
        return f"{self._head}{len(body)}\r\n\r\n{body}".encode()


class Tally:
    """What one phase saw. Times in seconds."""

    def __init__(self) -> None:
        self.first = array.array("d")
        self.total = array.array("d")
        self.gaps = array.array("d")
        """Between reads that brought tokens."""
        self.merged = 0
        """Events that came with another one: gaps of zero."""
        self.done = 0
        self.in_window = 0
        self.events = 0
        self.prompt_tokens = 0
        self.errors: Counter[str] = Counter()
        self.samples: dict[str, str] = {}

    def error(self, kind: str, sample: bytes = b"") -> None:
        self.errors[kind] += 1
        self.samples.setdefault(kind, sample[:300].decode("latin-1"))


class Client(asyncio.Protocol):
    """One connection that asks again as soon as it was answered."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self.busy = False
        self._sent = self._first = self._last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        self._load.clients.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._load.clients.remove(self)
        if self.busy:
            self._fail(f"connection lost ({type(exc).__name__ if exc else 'closed'})")

    def ask(self) -> None:
        self.busy = True
        self._sent = time.perf_counter()
        self._first = 0.0
        self._load.in_flight += 1
        self._transport.write(self._load.prompts.next())

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._load.at_once == 1:
            # Otherwise a server that leaves Nagle's algorithm on waits 40 ms for the acknowledgement that this kernel delays.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._fail(f"not HTTP ({type(e).__name__})", data)
            self._transport.abort()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        if not self._load.stream:
            return
        tally, events = self._load.tally, body.count(b"\n\n")
        if self._first:
            if self._now != self._last:
                tally.gaps.append(self._now - self._last)
                events -= 1
        elif _TEXT.search(body) is None:
            return
        else:
            self._first = self._now
            events -= 1
        self._last = self._now
        tally.merged += max(0, events)

    def on_message_complete(self) -> None:
        body = b"".join(self._parts)
        self._parts = []
        if not self.busy:
            return
        load, tally = self._load, self._load.tally
        if (wrong := self._wrong(body)) is not None:
            self._fail(wrong, body)
            asyncio.get_running_loop().call_later(0.05, load.next, self)  # a server that refuses must not be hammered
            return
        now = time.perf_counter()
        self.busy = False
        load.in_flight -= 1
        tally.done += 1
        tally.in_window += load.running
        tally.events += body.count(b"\n\n")
        tally.total.append(now - self._sent)
        if load.stream:
            tally.first.append(self._first - self._sent)
        if (found := _PROMPT.search(body, max(0, len(body) - _USAGE_FROM_END))) is not None:
            tally.prompt_tokens += int(found[1])
        if self._parser.should_keep_alive():
            load.next(self)
        else:
            self._transport.close()

    def _wrong(self, body: bytes) -> str | None:
        if (status := self._parser.get_status_code()) != 200:
            return f"status {status}"
        if self._load.stream and not body.rstrip().endswith(b"data: [DONE]"):
            return "no [DONE]"
        if _FINISH.search(body, max(0, len(body) - 2000)) is None:
            return "no finish reason"
        if _TEXT.search(body) is None:
            return "no text"
        found = _COMPLETION.search(body, max(0, len(body) - _USAGE_FROM_END))
        if found is None or int(found[1]) != self._load.max_tokens:
            return f"{found[1].decode() if found else 'no'} tokens instead of {self._load.max_tokens}"
        return None

    def _fail(self, kind: str, sample: bytes = b"") -> None:
        if self.busy:
            self.busy = False
            self._load.in_flight -= 1
            self._load.tally.error(kind, sample)


class Load:
    """All clients, and the phase they are in."""

    def __init__(self, port: int, model: str, count: int, max_tokens: int, at_once: int, stream: bool, seed: int) -> None:
        self.port, self.max_tokens, self.at_once, self.stream = port, max_tokens, at_once, stream
        self.prompts = Prompts(port, model, count, max_tokens, stream, seed)
        self.clients: list[Client] = []
        self.in_flight = 0
        self.running = False
        self.tally = Tally()

    def next(self, client: Client) -> None:
        if self.running and not client.busy:
            client.ask()

    async def connect(self) -> None:
        """Open what is missing, in small portions: a storm of connections is not what is measured."""
        loop = asyncio.get_running_loop()
        while (missing := self.at_once - len(self.clients)) > 0:
            for _ in range(min(50, missing)):
                sock = socket.socket()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setblocking(False)
                await loop.sock_connect(sock, ("127.0.0.1", self.port))
                await loop.create_connection(lambda: Client(self), sock=sock)
            await asyncio.sleep(0.01)

    async def phase(self, seconds: float, groups: dict[str, list[int]]) -> dict[str, Any]:
        await self.connect()
        self.tally = tally = Tally()
        for pids in groups.values():
            procstat.reset_peak(pids)
        gc.collect()
        gc.disable()
        before = {name: procstat.cpu(pids) for name, pids in groups.items()}
        machine, own, start = procstat.busy(), time.process_time(), time.perf_counter()
        self.running = True
        for client in list(self.clients):
            client.ask()
        await asyncio.sleep(seconds)
        self.running = False
        window = time.perf_counter() - start
        deadline = time.perf_counter() + DRAIN
        while self.in_flight and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)
        elapsed = time.perf_counter() - start
        own = time.process_time() - own
        used = {name: procstat.cpu(pids) - before[name] for name, pids in groups.items()}
        machine = procstat.busy() - machine
        gc.enable()
        if self.in_flight:
            tally.errors["not finished"] += self.in_flight
        done = max(1, tally.done)
        return {
            "done": tally.done,
            "requests_per_s": tally.in_window / window,
            "prompt_tokens": tally.prompt_tokens / done,
            "events_per_request": tally.events / done,
            "errors": sum(tally.errors.values()),
            "error_kinds": dict(tally.errors),
            "error_samples": tally.samples,
            "ttft_ms": _quantiles(tally.first),
            "itl_ms": _quantiles(tally.gaps, tally.merged),
            "latency_ms": _quantiles(tally.total),
            "us_per_request": {name: seconds / done * 1e6 for name, seconds in used.items()} | {"clients": own / done * 1e6},
            "us_per_token": {name: seconds / done / self.max_tokens * 1e6 for name, seconds in used.items()},
            "cores": {name: seconds / elapsed for name, seconds in used.items()},
            "memory": {name: procstat.memory(pids) for name, pids in groups.items()},
            "others_cores": max(0.0, (machine - own - sum(used.values())) / elapsed),
        }


def _quantiles(values: Sequence[float], zeros: int = 0) -> dict[str, float] | None:
    """In milliseconds, of the values and so many zeros."""
    if not values:
        return None
    ordered = sorted(values)
    total = len(ordered) + zeros

    def at(q: float) -> float:
        place = min(total - 1, int(q * total)) - zeros
        return 0.0 if place < 0 else ordered[place] * 1000

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1] * 1000}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    groups = {name: [int(pid) for pid in pids.split(",")] for name, pids in (group.split("=") for group in options.group)}
    load = Load(options.port, options.model, options.words, options.max_tokens, options.at_once, not options.unary, options.seed)
    if options.warm_up:
        await load.phase(options.warm_up, {})
    return await load.phase(options.seconds, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="bench")
    parser.add_argument("--words", type=int, default=20, help="of each prompt")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--unary", action="store_true", help="do not stream")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--group", action="append", default=[], metavar="NAME=PID[,PID]", help="measure these process trees")
    json.dump(uvloop.run(run(parser.parse_args())), sys.stdout)


if __name__ == "__main__":
    main()
