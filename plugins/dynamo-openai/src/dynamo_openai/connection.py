"""HTTP/1.1 to one server, for streams of tokens: a request out, the body in as it comes.

An HTTP client for everything costs more CPU for each event than everything else that becomes of a token together. This one wakes its reader
once for whatever has arrived, and does nothing for an event by itself.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

_HIGH, _LOW = 1 << 20, 1 << 18
"""Bytes that wait for a reader: past the first the server is not read from, below the second it is again."""
_SPARE = 64
"""Connections that are kept for requests to come."""
_FRESH = 4.0
"""Seconds for which an idle connection is trusted: servers close them after five."""


class Lost(Exception):
    """The connection could not be made, or broke before the answer was whole."""


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self) -> None:
        self.status = 0
        """Of the answer, once its head has come."""
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._body: list[bytes] = []
        self._size = 0
        self._paused = False
        self._whole = False
        self._keeps = False
        self._lost: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    # -------------------------------------------------------------- the reader's side

    @property
    def whole(self) -> bool:
        """The answer has come to its end."""
        return self._whole and not self._body

    @property
    def usable(self) -> bool:
        """Another request may be sent."""
        return self._whole and self._keeps and self._lost is None

    def send(self, request: bytes) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self.status, self._body, self._size, self._whole, self._keeps = 0, [], 0, False, False
        self._transport.write(request)

    async def head(self) -> int:
        """The status of the answer. :raises Lost: none came."""
        while not self.status:
            await self._more()
        return self.status

    async def read(self) -> bytes:
        """What has come since the last time; empty at the end. :raises Lost: the end did not come."""
        while not self._body:
            if self._whole:
                return b""
            await self._more()
        body, self._body, self._size = self._body, [], 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return body[0] if len(body) == 1 else b"".join(body)

    async def _more(self) -> None:
        if self._lost is not None:
            raise Lost(str(self._lost) or "the server closed the connection") from self._lost
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        """Now, whatever is under way: that is how a server learns that nobody waits any more."""
        self._lost = self._lost or ConnectionAbortedError("closed on this side")
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    # -------------------------------------------------------------- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and does not say so

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self.close()  # it speaks before it is asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._lost = ConnectionError(f"the server does not speak HTTP: {e}")
            self.close()
            return
        if self._size > _HIGH and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._lost or exc or ConnectionResetError("the server closed the connection")
        self._parser = None  # the two know each other: together they would be garbage that only the collector finds
        self._wake()

    # -------------------------------------------------------------- the parser's side

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        self._whole = True
        self._keeps = self._parser.should_keep_alive()


class Connections:
    """All connections to one server."""

    def __init__(self, url: str, headers: dict[str, str], connect_timeout: float) -> None:
        """:param url: `http://host:port`, with whatever path comes before `/v1`."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if secure else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if secure else None
        lines = {"host": parts.netloc, "content-type": "application/json", "accept": "text/event-stream", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._connect_timeout = connect_timeout
        self._idle: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._closed = False

    async def post(self, path: str, body: bytes, headers: dict[str, str]) -> Connection:
        """Send a request, and wait for the head of its answer. Give the connection back with `done`, whatever becomes of it.

        :raises Lost: the server cannot be reached, or hung up.
        """
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}{more}content-length: {len(body)}\r\n\r\n".encode("latin-1") + body
        if (spare := self._spare()) is not None:
            try:
                return await self._send(spare, request)
            except Lost:
                if self._closed:
                    raise
                # The server had just closed what it took for idle, and has not seen the request.
        return await self._send(await self._connect(), request)

    async def _send(self, connection: Connection, request: bytes) -> Connection:
        self._busy.add(connection)
        try:
            connection.send(request)
            await connection.head()
        except BaseException:
            self.done(connection)
            raise
        return connection

    async def _connect(self) -> Connection:
        if self._closed:
            raise Lost("closed on this side")
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            raise Lost(f"no connection within {self._connect_timeout:g} s") from None
        except OSError as e:
            raise Lost(e.strerror or str(e)) from e
        if self._closed:
            connection.close()
            raise Lost("closed on this side")
        return connection

    def _spare(self) -> Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and now - connection.idle_since < _FRESH:
                return connection
            connection.close()
        return None

    def done(self, connection: Connection) -> None:
        """The reader is done: a connection whose answer was read to its end is kept, any other is closed."""
        self._busy.discard(connection)
        if connection.usable and connection.whole and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
            if len(self._idle) > _SPARE:
                self._idle.popleft().close()
        else:
            connection.close()

    def close(self) -> None:
        """Every exchange ends with `Lost`."""
        self._closed = True
        for connection in (*self._busy, *self._idle):
            connection.close()
        self._idle.clear()
