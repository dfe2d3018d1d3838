"""The floor of the harness: answers chat requests with prepared bytes, one event a step, and does nothing else."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import httptools
import uvloop

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_MAX_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_START = b'{"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"bench","choices":'


def _event(data: bytes) -> bytes:
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


_TOKEN = _event(_START + b'[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}],"usage":null}')
_FINAL = _event(_START + b'[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}')
_UNARY = (
    b'{"id":"chatcmpl-0","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"length"}],'
    b'"usage":%b}'
)


class Stream:
    """One answer on its way."""

    def __init__(self, transport: asyncio.Transport, tokens: int, tail: bytes) -> None:
        self.transport, self.left, self.tail = transport, tokens, tail


class Engine:
    """Gives every stream one token a step."""

    def __init__(self, pace: float) -> None:
        self._streams: list[Stream] = []
        self._pace = pace
        self._loop = asyncio.get_running_loop()

    def add(self, stream: Stream) -> None:
        self._streams.append(stream)
        if len(self._streams) == 1:
            self._loop.call_later(self._pace, self._step)

    def _step(self) -> None:
        for stream in self._streams:
            stream.left -= 1
            stream.transport.write(_TOKEN if stream.left else _TOKEN + stream.tail)
        self._streams = [stream for stream in self._streams if stream.left and not stream.transport.is_closing()]
        if self._streams:
            self._loop.call_later(self._pace, self._step)


class Connection(asyncio.Protocol):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body = []
        found = _MAX_TOKENS.search(body, max(0, len(body) - 300))
        tokens = int(found[1]) if found else 16
        usage = b'{"prompt_tokens":%d,"completion_tokens":%d}' % (len(body) // 7, tokens)
        if b'"stream": true' not in body[-300:]:
            answer = _UNARY % (b"word " * tokens, usage)
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))
            return
        self._transport.write(_HEAD)
        tail = _FINAL + _event(_START + b'[],"usage":' + usage + b"}") + _event(b"[DONE]") + b"0\r\n\r\n"
        self._engine.add(Stream(self._transport, tokens, tail))


async def serve(port: int, pace: float) -> None:
    engine = Engine(pace)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), float(sys.argv[2])))
