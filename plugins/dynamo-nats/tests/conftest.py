"""What the suites of this plugin share: a handler, event members, and reading with a guard against hanging."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from dynamo_core.context import Context
from dynamo_core.discovery.contract import Discovery
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.events.contract import Event, EventContext, Gap
from dynamo_core.transport.contract import Item
from dynamo_core.types import Output

GUARD = 30.0


class Counting:
    """Endpoints that count: `count` as fast as it goes, `paced` one every 10 ms; it knows who is being served."""

    def __init__(self) -> None:
        self.serving = 0

    async def __call__(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]:
        self.serving += 1
        try:
            for i in range(int(payload)):
                if endpoint == "paced":
                    await asyncio.sleep(0.01)
                yield Output([i])
        finally:
            self.serving -= 1


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
def read_all():
    async def read(stream) -> list[int]:
        got: list[int] = []
        async with asyncio.timeout(GUARD):
            while items := await stream.read():
                got += [item.token_ids[0] for item in items]
        return got

    return read


@pytest.fixture
def eventually():
    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(GUARD):
            while not condition():
                await asyncio.sleep(0.02)

    return wait


@pytest.fixture
def member():
    """`async with member(plane, discovery) as lease:` starts an event plane as another process would."""

    @contextlib.asynccontextmanager
    async def start(plane, discovery: Discovery) -> AsyncGenerator[int]:
        lease = await discovery.lease()
        await plane.start(EventContext(discovery, lease))
        try:
            yield lease.id
        finally:
            await plane.stop()
            await lease.revoke()

    return start


@pytest.fixture
async def discovery(request):
    async with MemoryDiscovery(name=request.node.name) as store:
        yield store


@pytest.fixture
def account_for():
    """Read until event `last`: every number must come as an event or be covered by a gap. Returns how many gaps covered."""

    async def read(subscription, last: int) -> int:
        expected = missed = 0
        async with asyncio.timeout(GUARD):
            while expected <= last:
                match await anext(aiter(subscription)):
                    case Event(sequence=sequence):
                        assert sequence == expected
                        expected += 1
                    case Gap(missed=more):
                        missed += more
                        expected += more
                    case other:
                        raise AssertionError(other)
        return missed

    return read
