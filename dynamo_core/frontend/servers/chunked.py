"""Answers over HTTP/1.1 with fewer layers and fewer writes than hypercorn makes of them.

Between the head of a chunked response and its end, an event is a chunk and nothing else: no state changes, in hypercorn or in h11.
Taking each one through six coroutines and a lock costs more than making it. Head and end take the whole way, but what comes of that
is collected, so that the head leaves with the first bytes of the body, and the last bytes with the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.events import Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from starlette.types import Message, Send

from dynamo_core.frontend.servers.contract import DirectSend
from dynamo_core.frontend.servers.turns import Turn

_WAITING = 32 * 1024
"""Bytes that the socket has not taken, from which on the sender asks whether it must wait. Below asyncio's high-water mark, where it must."""


def chunked(scope: Any, send: Send) -> Send:
    """`send`, made cheaper for a request over HTTP/1.1; otherwise `send` itself."""
    stream = getattr(send, "__self__", None)
    if scope["type"] != "http" or scope["http_version"] != "1.1" or scope["method"] == "HEAD" or not isinstance(stream, HTTPStream):
        return send
    protocol = getattr(stream.send, "__self__", None)
    server = getattr(getattr(protocol, "send", None), "__self__", None)
    if not isinstance(protocol, H11Protocol) or not isinstance(server, TCPServer):
        return send
    return _Answer(stream, protocol, server, send, Turn.here())


class _Answer(DirectSend):
    __slots__ = ("_chunked", "_out", "_post", "_protocol", "_send", "_stream", "_transport", "_turn", "_writer")

    def __init__(self, stream: HTTPStream, protocol: H11Protocol, server: TCPServer, send: Send, turn: Turn) -> None:
        self._stream = stream
        self._protocol = protocol
        self._post = server.protocol_send
        self._writer = server.writer
        self._transport = server.writer.transport
        self._send = send
        self._turn = turn
        self._chunked = False
        self._out: list[bytes] = []
        """Collected, and not yet written."""

    async def __call__(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.body" and self._chunked and not self._stream.closed:
            if body := message.get("body", b""):
                self._out.append(b"%x\r\n%b\r\n" % (len(body), body))
            if not message.get("more_body", False):
                await self._collected({**message, "body": b""})
        else:
            await self._collected(message)
        if kind == "http.response.start":
            # Without a length, h11 frames the body of a 1.1 response in chunks.
            self._chunked = message["status"] == 200 and not any(name == b"content-length" for name, _ in message.get("headers", ()))
            asyncio.get_running_loop().call_soon(self.flush)  # a body that is late does not hold the head back
            return
        self.flush()
        if self._transport.get_write_buffer_size() > _WAITING:
            try:
                await self._writer.drain()
            except (ConnectionError, RuntimeError):
                pass  # the client is gone; the application learns it from `receive`

    def ready(self) -> bool:
        return self._chunked and not self._stream.closed and self._transport.get_write_buffer_size() <= _WAITING

    def write(self, body: bytes) -> None:
        if not self._out:
            self._turn.add(self.flush)
        self._out.append(b"%x\r\n%b\r\n" % (len(body), body))

    def watch(self, left: Callable[[], None]) -> Callable[[], None] | None:
        """What hypercorn puts in the queue of `receive` passes here first."""
        stream = self._stream
        put = getattr(stream, "app_put", None)
        if put is None:
            return None

        async def tell(message: Any) -> None:
            if message["type"] == "http.disconnect":
                left()
            await put(message)

        stream.app_put = tell
        if stream.closed:
            left()
        return lambda: setattr(stream, "app_put", put)

    async def _collected(self, message: Message) -> None:
        """The whole way through hypercorn, with its writes collected."""
        self._protocol.send = self._collect
        try:
            await self._send(message)
        finally:
            self._protocol.send = self._post

    async def _collect(self, event: Event) -> None:
        if isinstance(event, RawData):
            self._out.append(event.data)
        else:
            self.flush()
            await self._post(event)

    def flush(self) -> None:
        if out := self._out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            if not self._transport.is_closing():
                self._transport.write(data)
