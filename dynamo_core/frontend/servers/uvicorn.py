"""Uvicorn with httptools: HTTP/1.1 and TLS, at the least cost for each request and token. The choice for load."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, cast

import attrs
from attrs import validators as v
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from dynamo_core.config.schema import Tls
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.frontend.servers.contract import DirectSend
from dynamo_core.frontend.servers.sockets import BACKLOG, listening
from dynamo_core.frontend.servers.tracked import Tracked
from dynamo_core.frontend.servers.turns import Turn
from dynamo_core.transport.tls import renewing

_LAST_BYTES = 2.0
"""Seconds in which a connection must have flushed and closed once its requests have ended or were cut."""
_HANDSHAKE = 15.0
"""Seconds in which a client must have finished the TLS handshake."""
_MUCH = 64 * 1024
"""Bytes that do not wait for the end of the turn."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

log = logging.getLogger("dynamo.http")


class _Outgoing:
    """A transport that writes at the end of the turn, as far as uvicorn uses one."""

    __slots__ = ("_out", "_size", "_transport", "_turn", "abort", "get_extra_info", "is_closing", "pause_reading", "resume_reading")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._turn = Turn.here()
        self._out: list[bytes] = []
        self._size = 0
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        if not self._out:
            self._turn.add(self.flush)
        self._out.append(data)
        self._size += len(data)
        if self._size > _MUCH:  # the transport is to say whether its client keeps up
            self.flush()

    def flush(self) -> None:
        if out := self._out:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            self._size = 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _Connection(HttpToolsProtocol):
    """Uvicorn's, with a limit for heads in bytes and seconds."""

    def __init__(self, server: UvicornServer, config: Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self.logger = log
        self.access_log = False
        self._limits = server
        self._head: int | None = 0
        """Bytes of an unfinished head; `None` while there is none."""
        self._overdue: asyncio.TimerHandle | None = None
        self.watching: set[Callable[[], None]] = set()
        """To be called when the client leaves."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(cast(asyncio.Transport, _Outgoing(transport)))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_clock()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for left in tuple(self.watching):
            left()

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > self._limits.max_header_bytes and not self.transport.is_closing():
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._head = None
        self._forget_clock()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self.transport.close()  # answered before its body had ended, and nobody reads the rest

    def _unsupported_upgrade_warning(self) -> None:
        """Nobody is told: the request is served without the upgrade."""

    def _expect_head(self) -> None:
        self._head = 0
        self._overdue = self.loop.call_later(self._limits.header_timeout, self.transport.close)

    def _forget_clock(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


class _Direct(DirectSend):
    """A `send` that writes chunks of an answer at once."""

    __slots__ = ("_connection", "_cycle", "_flow", "_transport")

    def __init__(self, cycle: RequestResponseCycle, connection: _Connection) -> None:
        self._connection = connection
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    async def __call__(self, message: Message) -> None:
        await self._cycle.send(cast(Any, message))

    def ready(self) -> bool:
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and cycle.response_started and not (self._flow.write_paused or cycle.disconnected or cycle.response_complete)

    def write(self, body: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def watch(self, left: Callable[[], None]) -> Callable[[], None]:
        self._flow.resume_reading()  # or it would not be seen
        watching = self._connection.watching
        watching.add(left)
        if self._cycle.disconnected:
            left()
        return lambda: watching.discard(left)


class _Undelimited:
    """A `send` for HTTP/1.0, which knows no chunks: where there is no length, an answer ends with its connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._undelimited = False

    async def __call__(self, message: Message) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start" and not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
            self._undelimited = True
            cycle.chunked_encoding, cycle.keep_alive = False, False
        elif self._undelimited:
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(cast(Any, message))


class _Wrapper:
    """Gives the application the `send` that suits the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        cycle = getattr(send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle):
            if scope["http_version"] != "1.1":
                send = _Undelimited(cycle)
            elif scope["method"] != "HEAD" and isinstance(connection := getattr(cycle.on_response, "__self__", None), _Connection):
                send = _Direct(cycle, connection)
        await self._app(scope, receive, send)


@attrs.frozen
class UvicornServer:
    """Options of `http_server = { use = "uvicorn", ... }`."""

    keep_alive_timeout: float = attrs.field(default=75.0, validator=v.gt(0))
    """Seconds for which an idle connection stays open."""
    header_timeout: float = attrs.field(default=30.0, validator=v.gt(0))
    """Seconds in which a client must have sent the head of a request."""
    max_header_bytes: int = attrs.field(default=64 * 1024, validator=v.ge(1024))

    async def serve(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        tls: Tls | None,
        stop: asyncio.Event,
        on_listening: Callable[[int], None],
        drain_timeout: float,
        reuse_port: bool = False,
    ) -> None:
        """See `servers.contract.HttpServer`."""
        sock = listening(host, port, reuse_port=reuse_port)
        actual: int = sock.getsockname()[1]
        loop = asyncio.get_running_loop()
        tracked = Tracked(app)
        config = Config(cast(Any, _Wrapper(tracked)), interface="asgi3", ws="none", lifespan="off", log_config=None, proxy_headers=False,
                        server_header=False, timeout_keep_alive=self.keep_alive_timeout)  # pyright: ignore[reportArgumentType]
        config.load()
        state = ServerState()
        dating = asyncio.create_task(_date(state), name="uvicorn: the date")
        server = await loop.create_server(lambda: _Connection(self, config, state), sock=sock, backlog=BACKLOG, ssl=_context(tls),
                                          ssl_handshake_timeout=_HANDSHAKE if tls else None)
        try:
            on_listening(actual)
            await stop.wait()
        finally:
            server.close()
            dating.cancel()
            for connection in list(state.connections):
                connection.shutdown()  # at once if it is idle, and otherwise after its answer
            await tracked.drain(drain_timeout)
            await _close(state)


async def _date(state: ServerState) -> None:
    """Keep the header `date` of all answers current."""
    while True:
        state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        await asyncio.sleep(1.0)


def _context(tls: Tls | None) -> ssl.SSLContext | None:
    """With certificates that may be renewed on disk. :raises ConfigError: they cannot be used."""
    if tls is None:
        return None

    def make() -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(tls.cert, tls.key)
            if tls.client_ca is not None:
                context.load_verify_locations(tls.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(Problem(f"frontend.tls: {', '.join(str(path) for path in (tls.cert, tls.key, tls.client_ca) if path)}: {e}")) from e
        return context

    return renewing([path for path in (tls.cert, tls.key, tls.client_ca) if path], make)


async def _close(state: ServerState) -> None:
    end = asyncio.get_running_loop().time() + _LAST_BYTES
    for connection in list(state.connections):
        connection.transport.close()
    while state.connections and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 (uvicorn only keeps a set of them)
        await asyncio.sleep(0.01)
    for connection in list(state.connections):
        connection.transport.abort()
