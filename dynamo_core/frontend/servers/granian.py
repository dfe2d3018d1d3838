"""Granian: HTTP/1.1 and HTTP/2 in Rust threads, the application in the caller's event loop. The choice for load."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import attrs
from attrs import validators as v
from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.embed import Server
from starlette.types import ASGIApp

from dynamo_core.config.schema import Tls
from dynamo_core.frontend.servers.sockets import BACKLOG, listening
from dynamo_core.frontend.servers.tracked import Tracked

_QUIET: dict[str, Any] = {"incremental": True, "formatters": {}, "handlers": {}, "loggers": {"_granian": {}}}
"""Granian configures `logging` when it starts; an incremental configuration leaves everybody's handlers alone."""


@attrs.frozen
class GranianServer:
    """Options of `http_server = { use = "granian", ... }`."""

    threads: int = attrs.field(default=1, validator=v.ge(1))
    """Rust threads for sockets and HTTP; the application has one thread all the same."""
    max_connections: int = attrs.field(default=16384, validator=v.ge(1))
    header_timeout: float = attrs.field(default=30.0, validator=v.gt(0))
    """Seconds in which a client must have sent the head of a request."""
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
        sock = listening(host, port, reuse_port=reuse_port)
        actual: int = sock.getsockname()[1]
        tracked = Tracked(app)
        server = _Server(
            tracked,
            sock,
            host,
            actual,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto,
            websockets=False,
            runtime_threads=self.threads,
            backlog=BACKLOG,
            backpressure=self.max_connections,
            http1_settings=HTTP1Settings(header_read_timeout=int(self.header_timeout * 1000)),
            http2_settings=HTTP2Settings(max_concurrent_streams=self.http2_streams),
            log_level=LogLevels.error,
            log_dictconfig=_QUIET,
            ssl_cert=tls and tls.cert,
            ssl_key=tls and tls.key,
            ssl_ca=tls and tls.client_ca,
            ssl_client_verify=bool(tls and tls.client_ca),
        )
        running = asyncio.ensure_future(server.serve())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.sleep(0)
            on_listening(actual)
            await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
                raise OSError("granian stopped by itself; its log has the reason")
            server.stop()
            await tracked.drain(drain_timeout)
            await running
        finally:
            stopping.cancel()
            running.cancel()


class _Server(Server):
    """Granian's embedded server on a socket that is listening already."""

    def __init__(self, app: ASGIApp, sock: socket.socket, host: str, port: int, **options: Any) -> None:
        super().__init__(app, host, port, **options)
        self._sock = sock

    def _init_shared_socket(self) -> None:
        # The worker takes ownership of the descriptor and closes it.
        self._shd = SocketHolder(self._sock.detach(), False, BACKLOG)  # type: ignore[call-arg]
