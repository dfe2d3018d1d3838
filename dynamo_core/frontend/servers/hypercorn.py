"""Hypercorn: HTTP/1.1 and HTTP/2, TLS and mTLS. The default server."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, cast

import attrs
from attrs import validators as v
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from starlette.types import ASGIApp

from dynamo_core.config.schema import Tls
from dynamo_core.frontend.servers.chunked import chunked
from dynamo_core.frontend.servers.sockets import BACKLOG, listening
from dynamo_core.frontend.servers.tracked import Tracked
from dynamo_core.transport.tls import renewing

_LAST_BYTES = 2.0
"""Seconds in which a connection must have flushed and closed once its requests have ended or were cut."""


class _IdleClock:
    """One timer. hypercorn's own starts two tasks after every answer, to cancel them at the next request."""

    def __init__(self, seconds: float, leaving: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._leaving = leaving
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._close: Callable[[], object] | None = None

    async def restart(self, task_group: Any, action: Callable[[], Awaitable[None]]) -> None:
        await self.stop()
        self._close = lambda: task_group.spawn(action)
        self._timer = self._loop.call_later(0 if self._leaving() else self._seconds, self.now)

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._close = None

    def now(self) -> None:
        """Close the connection, if it is idle."""
        close, self._close = self._close, None
        if close is not None:
            close()


class _Connection(TCPServer):
    """A connection that is gone when its client is: hypercorn's own keeps it until the keep-alive timeout."""

    _ended = False

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop, config: Config, context: WorkerContext, reader: asyncio.StreamReader,
                 writer: asyncio.StreamWriter) -> None:
        super().__init__(app, loop, config, context, {}, reader, writer)
        self.clock = _IdleClock(config.keep_alive_timeout, context.terminated.is_set)
        self.idle_task = cast(Any, self.clock)

    async def _read_data(self) -> None:
        await super()._read_data()
        self._ended = True
        await self.idle_task.stop()

    async def _idle_timeout(self) -> None:
        await self._initiate_server_close()

    def release(self) -> None:
        """Part the circles in which the parts of a connection refer to each other, so that its last request goes with it and waits for no collector."""
        wrapper = vars(self).get("protocol")
        if wrapper is not None:
            vars(wrapper.protocol).clear()
            vars(wrapper).clear()
        vars(self).clear()

    async def protocol_send(self, event: Event) -> None:
        if not (self._ended and isinstance(event, Updated)):  # which would start the idle clock again
            await super().protocol_send(event)


class _Wrapper(ASGIWrapper):
    """Gives the application a cheaper `send` where there is one."""

    async def __call__(self, scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        await self.app(scope, receive, cast(Any, chunked(scope, send)))


@attrs.frozen
class HypercornServer:
    """Options of `http_server = { use = "hypercorn", ... }`."""

    keep_alive_timeout: float = attrs.field(default=75.0, validator=v.gt(0))
    """Seconds for which an idle connection stays open, and in which the first request must have sent its head."""
    max_header_bytes: int = attrs.field(default=64 * 1024, validator=v.ge(1024))
    http2_streams: int = attrs.field(default=1000, validator=v.ge(1))
    """Requests in progress on one HTTP/2 connection."""

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
        config = self._config(tls)
        sock = listening(host, port, reuse_port=reuse_port)
        loop = asyncio.get_running_loop()
        tracked = Tracked(app)
        wrapped = _Wrapper(cast(Any, tracked))
        context = WorkerContext(None)
        connections: dict[asyncio.Task[Any], _Connection] = {}

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections[task] = connection = _Connection(wrapped, loop, config, context, reader, writer)
            try:
                await connection
            finally:
                del connections[task]
                connection.release()

        actual: int = sock.getsockname()[1]
        handshake = config.ssl_handshake_timeout if tls else None
        server = await asyncio.start_server(connected, sock=sock, backlog=BACKLOG, ssl=_context(config, tls), ssl_handshake_timeout=handshake)
        try:
            on_listening(actual)
            await stop.wait()
        finally:
            server.close()
            await context.terminated.set()  # connections close after their answer, and now if they are idle
            for connection in list(connections.values()):
                connection.clock.now()
            await tracked.drain(drain_timeout)
            await _close(set(connections))

    def _config(self, tls: Tls | None) -> Config:
        config = Config()
        config.keep_alive_timeout = self.keep_alive_timeout
        config.keep_alive_max_requests = 2**31
        config.h11_max_incomplete_size = self.max_header_bytes
        config.h2_max_header_list_size = self.max_header_bytes
        config.h2_max_concurrent_streams = self.http2_streams
        config.include_server_header = False
        config.errorlog = logging.getLogger("dynamo.http")
        config.accesslog = None
        if tls is not None:
            config.certfile, config.keyfile = str(tls.cert), str(tls.key)
            if tls.client_ca is not None:
                config.ca_certs = str(tls.client_ca)
                config.verify_mode = ssl.CERT_REQUIRED
        return config


def _context(config: Config, tls: Tls | None) -> ssl.SSLContext | None:
    """With certificates that may be renewed on disk. :raises ConfigError: they cannot be used."""
    if tls is None:
        return None

    def make() -> ssl.SSLContext:
        context = config.create_ssl_context()
        assert context is not None
        return context

    return renewing([path for path in (tls.cert, tls.key, tls.client_ca) if path], make)


async def _close(connections: set[asyncio.Task[Any]]) -> None:
    if connections:
        _, late = await asyncio.wait(connections, timeout=_LAST_BYTES)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
