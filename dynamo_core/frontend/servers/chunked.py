"""Streamed bodies over HTTP/1.1, past the layers of hypercorn that have nothing to say about them.

Between the head of a chunked response and its end, an event is a chunk and nothing else: no state changes, in hypercorn or in h11.
Taking each one through six coroutines and a lock costs more than making it. Head, end and errors take the whole way.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from starlette.types import Message, Send

_WAITING = 32 * 1024
"""Bytes that the socket has not taken, from which on the sender asks whether it must wait. Below asyncio's high-water mark, where it must."""


def chunked(scope: Any, send: Send) -> Send:
    """`send`, made cheaper for a request whose answer may be chunked; otherwise `send` itself."""
    stream = getattr(send, "__self__", None)
    if scope["http_version"] != "1.1" or scope["method"] == "HEAD" or not isinstance(stream, HTTPStream):
        return send
    protocol = getattr(stream.send, "__self__", None)
    server = getattr(getattr(protocol, "send", None), "__self__", None)
    if not isinstance(protocol, H11Protocol) or not isinstance(server, TCPServer):
        return send
    return _Chunks(stream, server.writer, send).send


class _Chunks:
    def __init__(self, stream: HTTPStream, writer: asyncio.StreamWriter, send: Send) -> None:
        self._stream = stream
        self._writer = writer
        self._transport = writer.transport
        self._send = send
        self._chunked = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body" and self._chunked:
            body = message.get("body", b"")
            more = message.get("more_body", False)
            if body and not self._stream.closed and not self._transport.is_closing():
                self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
                if more:
                    if self._transport.get_write_buffer_size() > _WAITING:
                        await self._drain()
                    return
                message = {**message, "body": b""}
        await self._send(message)
        if message["type"] == "http.response.start":
            # Without a length, h11 frames the body of a 1.1 response in chunks.
            self._chunked = message["status"] == 200 and not any(name == b"content-length" for name, _ in message["headers"])

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            pass  # the client is gone; the application learns it from `receive`
