"""What every HTTP server must do: run an ASGI application inside the caller's event loop, until told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from starlette.types import ASGIApp

from dynamo_core.config.schema import Tls


@runtime_checkable
class HttpServer(Protocol):
    """One way to run the application. Its options are the fields of the attrs class that implements it."""

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
        """Serve until `stop` is set; then accept nothing more, let open answers finish for `drain_timeout` seconds, and close.

        Answers that are still open after that are cut, and their ASGI tasks cancelled. `on_listening` is called once, with the
        port (`port` 0 takes any free one), when connections are accepted. `reuse_port` lets several processes share the port.

        :raises OSError: the address cannot be bound.
        """
        ...
