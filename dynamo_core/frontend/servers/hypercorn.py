"""Hypercorn: HTTP/1.1 and HTTP/2, TLS and mTLS. The default server."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, cast

import attrs
from attrs import validators as v
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config
from starlette.types import ASGIApp

from dynamo_core.config.schema import Tls
from dynamo_core.frontend.servers.sockets import BACKLOG, listening
from dynamo_core.frontend.servers.tracked import Tracked

_log = logging.getLogger("dynamo.http.hypercorn")
_log.setLevel(logging.WARNING)  # it would announce its address, by descriptor; the caller does it better

_BACKSTOP = 5.0
"""Seconds after the drain timeout at which hypercorn cancels its connections; requests were cut by then."""


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
        config = self._config(tls, drain_timeout)
        tracked = Tracked(app)
        draining: list[asyncio.Task[None]] = []
        sock = listening(host, port, reuse_port=reuse_port)
        actual: int = sock.getsockname()[1]
        config.bind = [f"fd://{sock.detach()}"]

        async def stopping() -> None:
            on_listening(actual)  # hypercorn awaits this trigger right after it has started to accept
            await stop.wait()
            draining.append(asyncio.ensure_future(tracked.drain(drain_timeout)))

        await hypercorn_serve(cast(Any, tracked), config, shutdown_trigger=stopping, mode="asgi")
        await asyncio.gather(*draining)

    def _config(self, tls: Tls | None, drain_timeout: float) -> Config:
        config = Config()
        config.backlog = BACKLOG
        config.graceful_timeout = drain_timeout + _BACKSTOP
        config.keep_alive_timeout = self.keep_alive_timeout
        config.keep_alive_max_requests = 2**31
        config.h11_max_incomplete_size = self.max_header_bytes
        config.h2_max_header_list_size = self.max_header_bytes
        config.h2_max_concurrent_streams = self.http2_streams
        config.include_server_header = False
        config.errorlog = _log
        config.accesslog = None
        if tls is not None:
            config.certfile, config.keyfile = str(tls.cert), str(tls.key)
            if tls.client_ca is not None:
                config.ca_certs = str(tls.client_ca)
                config.verify_mode = ssl.CERT_REQUIRED
        return config
