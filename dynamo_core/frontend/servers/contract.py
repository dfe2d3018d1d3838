"""What every HTTP server must do: run an ASGI application inside the caller's event loop, until told to stop."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from starlette.types import ASGIApp, Message

from dynamo_core.config.schema import Tls


class DirectSend(abc.ABC):
    """An ASGI `send` that can also be called without being awaited. Optional; a middleware that wraps `send` takes it away, as it must."""

    __slots__ = ()

    @abc.abstractmethod
    async def __call__(self, message: Message) -> None: ...

    @abc.abstractmethod
    def ready(self) -> bool:
        """The head is out, the client keeps up: `write` may be called."""
        ...

    @abc.abstractmethod
    def write(self, body: bytes) -> None:
        """What `send` does with a body that is not the last, at once."""
        ...

    def watch(self, left: Callable[[], None]) -> Callable[[], None] | None:
        """Call `left` once the client has left; what is returned ends the watch. `None`: such a client is known by `receive` alone, which takes a task."""
        return None


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
