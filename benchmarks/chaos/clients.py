"""Steady load that knows what every answer must be: token for token what an undisturbed fleet answers."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import attrs
import httptools

GIVE_UP = 150.0
"""Seconds after which an answer that has not ended counts as lost."""
RETRIES = 5
"""Attempts to be heard at all. A connection that is refused or closed before any byte of an answer is tried again, as client libraries do."""


@attrs.define
class Answer:
    """How one request ended. Times are `time.monotonic()` seconds."""

    prompt: str
    started: float
    ended: float = 0.0
    status: int = 0
    tokens: list[int] = attrs.field(factory=list)
    text: str = ""
    workers: list[str] = attrs.field(factory=list)
    error: str = ""
    """Empty when it is complete."""
    broken: bool = False
    """The connection ended in the middle of the answer."""
    pause: float = 0.0
    """The longest wait between two reads."""
    retried: int = 0


class _Reader(asyncio.Protocol):
    """Collects one answer and ends with the connection."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.body: list[bytes] = []
        self.complete = False
        self.last = time.monotonic()
        self.pause = 0.0
        self.heard = False
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        return self._parser.get_status_code() if self.heard else 0

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.pause, self.last, self.heard = max(self.pause, now - self.last), now, True
        with contextlib.suppress(httptools.HttpParserError):
            self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body.append(body)
        self.load.count(body.count(b"data: {"))

    def on_message_complete(self) -> None:
        self.complete = True
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


@attrs.define
class Load:
    """`streams` lanes, each with one request at a time, on a connection of its own so that the replicas share them."""

    port: int
    streams: int
    tokens: int
    seed: int
    host: str = "127.0.0.1"
    key: str = ""
    expected: dict[str, list[int]] = attrs.field(factory=dict)
    answers: list[Answer] = attrs.field(factory=list)
    running: bool = False
    bins: Counter[int] = attrs.field(factory=Counter)
    """Events by tenth of a second."""

    def count(self, events: int) -> None:
        self.bins[int(time.monotonic() * 10)] += events

    async def learn(self, prompts: int) -> None:
        """What the answers are while nothing is wrong."""
        dice = random.Random(self.seed)
        words = ("rain", "stone", "river", "seven", "light", "under", "glass", "early")
        asked = [f"{number} " + " ".join(dice.choices(words, k=dice.randrange(8, 160))) for number in range(prompts)]
        for answer in await asyncio.gather(*map(self.ask, asked)):
            if answer.error or len(answer.tokens) != self.tokens:
                raise RuntimeError(f"the undisturbed fleet failed: {answer.error or f'{len(answer.tokens)} tokens'}")
            self.expected[answer.prompt] = answer.tokens

    async def ask(self, prompt: str) -> Answer:
        answer = Answer(prompt, time.monotonic())
        body = json.dumps(
            {
                "model": "sim",
                "prompt": prompt,
                "max_tokens": self.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "dynamo": {"annotations": ["token_ids", "worker"]},
            }
        ).encode()
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}\r\n{key}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        for attempt in range(RETRIES):
            answer.retried = attempt
            reader = _Reader(self)
            try:
                sock = socket.socket()
                sock.setblocking(False)
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, (self.host, self.port)), 20.0)
                transport, _ = await asyncio.get_running_loop().create_connection(lambda reader=reader: reader, sock=sock)
            except OSError as e:
                answer.error = f"cannot connect: {type(e).__name__}"
                await asyncio.sleep(0.2)
                continue
            transport.write(head.encode() + body)
            try:
                await asyncio.wait_for(reader.done, GIVE_UP)
            except TimeoutError:
                reader.pause = GIVE_UP
            finally:
                transport.abort()
            if reader.heard or reader.pause == GIVE_UP:
                _judge(answer, reader)
                break
            answer.error = "closed before any byte of an answer"
            await asyncio.sleep(0.05)
        answer.ended = time.monotonic()
        return answer

    async def _lane(self, number: int) -> None:
        dice = random.Random(self.seed * 1000 + number)
        await asyncio.sleep(dice.random() * 2)
        prompts = list(self.expected)
        while self.running:
            answer = await self.ask(dice.choice(prompts))
            self.answers.append(answer)
            if answer.error:
                await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def under_way(self) -> AsyncGenerator[None]:
        self.running, self.answers, self.bins = True, [], Counter()
        lanes = [asyncio.create_task(self._lane(i)) for i in range(self.streams)]
        try:
            yield
        finally:
            self.running = False
            await asyncio.gather(*lanes)

    def rate(self, start: float, end: float) -> float:
        """Events a second between two times."""
        first, last = int(start * 10), int(end * 10)
        return sum(self.bins[i] for i in range(first, last)) / max(0.1, (last - first) / 10)

    def steady_again(self, after: float, before: float, share: float = 0.8) -> float | None:
        """Seconds after `after` until a whole second brought at least `share` of what a second brought `before`; `None`: never."""
        end = int(time.monotonic() * 10)
        for start in range(int(after * 10), end - 9):
            if sum(self.bins[i] for i in range(start, start + 10)) >= share * before:
                return start / 10 - after if start / 10 > after else 0.0
        return None


def _judge(answer: Answer, reader: _Reader) -> None:
    answer.status, answer.pause = reader.status, reader.pause
    body = b"".join(reader.body)
    if reader.pause == GIVE_UP:
        answer.error = f"nothing came for {GIVE_UP:g} s"
        return
    if reader.status != 200:
        answer.error = f"HTTP {reader.status}: {body[:160].decode('utf-8', 'replace')}"
        return
    answer.error = ""
    for line in body.split(b"\n\n"):
        if not line.startswith(b"data: {"):
            continue
        try:
            event: dict[str, Any] = json.loads(line[6:])
        except ValueError:
            break
        if "error" in event:
            answer.error = f"error event: {event['error']['message'][:160]}"
            return
        answer.text += "".join(choice["text"] for choice in event.get("choices", ()))
        if (report := event.get("dynamo")) is not None:
            answer.workers = report.get("worker", [])
            answer.tokens = [token for ids in report.get("token_ids", ()) for token in ids]
    if not reader.complete or not body.rstrip().endswith(b"[DONE]"):
        answer.broken, answer.error = True, "the answer broke off"


def difference(expected: Sequence[int], given: Sequence[int]) -> tuple[int, int]:
    """Tokens that are missing, and tokens that should not be there."""
    lost = doubled = 0
    for tag, a, b, c, d in difflib.SequenceMatcher(None, expected, given, autojunk=False).get_opcodes():
        if tag != "equal":
            lost, doubled = lost + b - a, doubled + d - c
    return lost, doubled


class SlowReaders:
    """Clients that ask and then read nothing, with small receive buffers, so that the server's sends must wait."""

    def __init__(self, port: int, count: int, tokens: int, host: str = "127.0.0.1") -> None:
        self._port, self._count, self._tokens, self._host = port, count, tokens, host
        self._sockets: list[socket.socket] = []

    async def __aenter__(self) -> SlowReaders:
        loop = asyncio.get_running_loop()
        body = json.dumps({"model": "sim", "prompt": "slow " * 50, "max_tokens": self._tokens, "ignore_eos": True, "stream": True, "logprobs": None}).encode()
        request = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        for _ in range(self._count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, (self._host, self._port))
            await loop.sock_sendall(sock, request)
            self._sockets.append(sock)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for sock in self._sockets:
            sock.close()


def failures(answers: Sequence[Answer]) -> dict[str, int]:
    return dict(Counter(answer.error for answer in answers if answer.error))
