"""What the kit of request planes serves, and what it throws at them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

from dynamo_core import errors
from dynamo_core.context import Context
from dynamo_core.errors import EndpointNotFound
from dynamo_core.transport.contract import Item
from dynamo_core.types import Output, TokenLogprob


class Endpoints:
    """A handler made of small async generators, by name; it remembers what happened to each stream."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}
        """Items that the iterator of this request has been asked for."""
        self.closed: dict[str, asyncio.Event] = {}
        """Set when the iterator of this request is closed, however."""
        self.contexts: dict[str, Context] = {}
        self._started: dict[str, asyncio.Event] = {}
        self.gate = asyncio.Event()
        """What `wait` waits for."""

    def ended(self, request: str) -> asyncio.Event:
        return self.closed.setdefault(request, asyncio.Event())

    def started(self, request: str) -> asyncio.Event:
        return self._started.setdefault(request, asyncio.Event())

    async def __call__(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        self.contexts[context.id] = context
        self.asked[context.id] = 0
        self.started(context.id).set()
        try:
            async for item in getattr(self, endpoint, self.nobody)(payload, context):
                self.asked[context.id] += 1
                yield item
        finally:
            self.ended(context.id).set()

    async def nobody(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        raise EndpointNotFound("nobody serves that here")
        yield b""

    async def count(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """`n` numbered outputs, at an uneven pace."""
        dice = random.Random(context.id)
        for i in range(int(payload)):
            yield Output([i])
            if dice.random() < 0.3:
                await asyncio.sleep(0)

    async def flood(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """`n` numbered outputs without ever waiting."""
        for i in range(int(payload)):
            yield Output([i])

    async def fat(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """`n` outputs of 2000 tokens each."""
        body = list(range(100_000, 102_000))
        for i in range(int(payload)):
            yield Output([i, *body])

    async def chunks(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """`n` items of 256 KiB."""
        for i in range(int(payload)):
            yield i.to_bytes(4, "big") * 65536

    async def mixed(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        for i in range(int(payload)):
            yield Output([i]) if i % 3 else str(i).encode()
            if i % 7 == 0:
                await asyncio.sleep(0)

    async def echo(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        yield payload

    async def wait(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """`n` outputs, then nothing until the gate opens."""
        for i in range(int(payload)):
            yield Output([i])
        await self.gate.wait()
        yield Output([-1])

    async def stubborn(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """Outputs for ever, whoever cancels."""
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)
            yield Output([0])

    async def everything(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        yield EVERYTHING

    async def fail(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        """Two outputs, then the error of that code."""
        yield Output([0])
        yield Output([1])
        raise errors.from_wire(payload.decode(), "said on purpose")

    async def crash(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        yield Output([0])
        raise ZeroDivisionError("a secret detail")

    async def cancel_itself(self, payload: bytes, context: Context) -> AsyncIterator[Item]:
        yield Output([0])
        raise asyncio.CancelledError


EVERYTHING = Output([1, 2**31], 3, "length", "</s>", [TokenLogprob(1, -0.5, [(7, -1.25)]), TokenLogprob(2, -0.75)], 17,
                    {"ticket": [1, {"x": None}], "raw": b"\0\xff"}, [None, TokenLogprob(5, -2.0)], [0.5, -0.25])


def numbers(items: Sequence[Item]) -> list[int]:
    return [item.token_ids[0] if isinstance(item, Output) else int(item) for item in items]


_dice = random.Random(7)
GARBAGE: Sequence[bytes] = (
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /x HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _dice.randbytes(200),
    b"\xff" * 4096,
    b"\0" * 4096,
    b"\0\0\0\x05",
    b"\0\0\0\x02\x93\x01",
    *(_dice.randbytes(size) for size in (1, 3, 64, 1000, 100_000)),
)
