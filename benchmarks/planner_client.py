"""An open loop of clients: each request is sent at its time, however many of those before it still wait.

    python -m benchmarks.planner_client --port 8000 --requests requests.json --start 1790000000.0 --out answers.json

`requests.json` has `[seconds after the start, prompt tokens, tokens to generate]` for each; `answers.json` one `Answer` for each. Times to the first token count from the time at which a request was
due, so that a client that is late does not flatter the server.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import time
from pathlib import Path
from typing import cast

import httptools
import msgspec
import uvloop

MODEL = "sim"
PATIENCE = 60.0
"""Seconds that an answer may take."""
_TEXT = re.compile(rb'"text":\s*"[^"]')
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_FINISH = re.compile(rb'"finish_reason":\s*"')


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What a client saw of one request. Seconds."""

    at: float
    """When it was due, after the start."""
    lag: float
    """How much later it was sent."""
    ttft: float = 0.0
    itl: float = 0.0
    """Mean time between tokens."""
    wrong: str = ""
    """Why it failed."""


class Prompts:
    """Token ids that no two requests share a beginning of: a number of its own, then a stretch of a long list."""

    def __init__(self, seed: int, longest: int) -> None:
        self._dice = random.Random(seed)
        self._ids = [str(self._dice.randrange(100, 1000)) for _ in range(2 * longest)]
        self._number = 0

    def next(self, tokens: int) -> str:
        self._number += 1
        own = [str(100 + self._number // 900**place % 900) for place in range(3)][:tokens]
        start = self._dice.randrange(len(self._ids) // 2)
        return ",".join([*own, *self._ids[start : start + tokens - len(own)]])


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes, tokens: int) -> None:
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it failed, or nothing."""
        self.first = self.last = 0.0
        self._request, self._tokens = request, tokens
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._end(f"not HTTP ({type(e).__name__})")

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        if _TEXT.search(body) is not None:
            self.last = time.time()
            self.first = self.first or self.last

    def on_message_complete(self) -> None:
        body = b"".join(self._parts)
        counted = _COMPLETION.search(body, max(0, len(body) - 1500))
        if (status := self._parser.get_status_code()) != 200:
            self._end(f"status {status}: {body[:200].decode('latin-1')}")
        elif not body.rstrip().endswith(b"data: [DONE]") or _FINISH.search(body) is None:
            self._end("the stream has no end")
        elif counted is None or int(counted[1]) != self._tokens:
            self._end(f"{counted[1].decode() if counted else 'no'} tokens instead of {self._tokens}")
        else:
            self._end("" if self.first else "no text")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"connection lost ({type(exc).__name__ if exc else 'closed'})")

    def _end(self, why: str) -> None:
        if not self.over.done():
            self.over.set_result(why)


async def ask(port: int, start: float, at: float, prompt: str, tokens: int) -> Answer:
    body = (f'{{"model":"{MODEL}","stream":true,"stream_options":{{"include_usage":true}},"max_tokens":{tokens},"ignore_eos":true,"temperature":0,'
            f'"prompt":[{prompt}]}}').encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    due = start + at
    lag = time.time() - due
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(PATIENCE):
            transport, exchange = await asyncio.get_running_loop().create_connection(lambda: _Exchange(head.encode() + body, tokens), "127.0.0.1", port)
            wrong = await exchange.over
    except TimeoutError:
        return Answer(at, lag, wrong=f"no answer within {PATIENCE:g} s")
    except OSError as e:
        return Answer(at, lag, wrong=f"no connection ({type(e).__name__})")
    finally:
        if transport is not None:
            transport.close()
    return Answer(at, lag, wrong=wrong) if wrong else Answer(at, lag, exchange.first - due, (exchange.last - exchange.first) / max(1, tokens - 1))


async def drive(port: int, start: float, requests: list[tuple[float, int, int]], seed: int) -> list[Answer]:
    prompts = Prompts(seed, max(prompt for _, prompt, _ in requests))
    asked: list[asyncio.Task[Answer]] = []
    for at, prompt, tokens in requests:
        ready = prompts.next(prompt)
        await asyncio.sleep(start + at - time.time())
        asked.append(asyncio.create_task(ask(port, start, at, ready, tokens)))
    return list(await asyncio.gather(*asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--start", type=float, required=True, help="Unix time")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    requests = msgspec.json.decode(options.requests.read_bytes(), type=list[tuple[float, int, int]])
    options.out.write_bytes(msgspec.json.encode(uvloop.run(drive(options.port, options.start, requests, options.seed))))


if __name__ == "__main__":
    main()
