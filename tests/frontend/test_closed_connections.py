"""What a connection leaves behind when it is closed: nothing that waits for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest
from hypercorn.protocol.h11 import H11Protocol

from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.servers.hypercorn import _Connection

BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture
def no_collector():
    gc.collect()
    gc.freeze()  # what is there already need not be looked through
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_and_its_request_are_gone_at_once(run, no_collector, stream):
    body = json.dumps(BODY | {"stream": stream}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    async with run() as site:
        before = _left()
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(request)
            async with asyncio.timeout(20):
                await reader.readuntil(b"[DONE]\n\n" if stream else b'"usage":')
            writer.transport.abort()  # without a word, as many load generators leave
        async with asyncio.timeout(20):
            while _left() > before:
                await asyncio.sleep(0.05)


def _left() -> int:
    return sum(isinstance(found, (Exchange, _Connection, H11Protocol)) for found in gc.get_objects())
