"""The `tcp` request plane: one connection for each pair of processes, streams multiplexed on it, outputs batched by engine step."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import urlsplit

import attrs
from attrs import validators as v

from dynamo_core.errors import CannotConnect, ConfigError
from dynamo_core.transport.connection import Timing
from dynamo_core.transport.contract import Channel, Handler, Server
from dynamo_core.transport.frames import Hello
from dynamo_core.transport.tcp_client import TcpChannel
from dynamo_core.transport.tcp_server import TcpServer, TcpServerConnection
from dynamo_core.transport.tls import PlaneTls, client_context, server_context


@attrs.frozen
class TcpPlane:
    """Length-prefixed msgpack over TCP, optionally TLS. Both sides are configured alike."""

    port: int = attrs.field(default=0, validator=[v.ge(0), v.le(65535)])
    """0: any free port."""
    tls: PlaneTls | None = None
    max_frame_bytes: int = attrs.field(default=64 * 2**20, validator=[v.ge(4096), v.lt(2**32)])
    """The largest request or item that this process receives."""
    max_streams: int = attrs.field(default=65536, validator=v.ge(1))
    """Of one connection; one more gets a migratable overload error."""
    window_items: int = attrs.field(default=1024, validator=v.ge(1))
    """Items of one stream on the way or unread, past which its handler is not asked for more."""
    window_bytes: int = attrs.field(default=4 * 2**20, validator=v.ge(1))
    """The same in bytes, of streams that carry bytes; one item may exceed it."""
    connect_timeout: float = attrs.field(default=3.0, validator=v.gt(0))
    """Seconds, for the connection, the TLS handshake and the hello together; a peer that connects to us has as long."""
    ping_interval: float = attrs.field(default=2.5, validator=v.gt(0))
    """Seconds of silence after which the peer is asked whether it lives."""
    ping_timeout: float = attrs.field(default=5.0, validator=v.gt(0))
    """Seconds it has to answer. A worker that stands still for less loses nothing."""

    scheme = "tcp"

    async def serve(self, handler: Handler, host: str) -> Server:
        server = TcpServer(handler)
        loop = asyncio.get_running_loop()
        # One address of a name that has several: with port 0 each would get a port of its own, and only one can be advertised.
        family, _, _, _, where = (await loop.getaddrinfo(host, self.port, type=socket.SOCK_STREAM))[0]
        listener = await loop.create_server(
            lambda: TcpServerConnection(server, self._offer(), self._timing()), str(where[0]), self.port, family=family, backlog=1024,
            ssl=server_context(self.tls) if self.tls else None, ssl_handshake_timeout=self.connect_timeout if self.tls else None)
        server.listening(listener, f"tcp://{f'[{host}]' if ':' in host else host}:{listener.sockets[0].getsockname()[1]}")
        return server

    async def connect(self, address: str) -> Channel:
        url = urlsplit(address)
        if url.scheme != self.scheme or not url.hostname or not url.port:
            raise CannotConnect(f"{address}: not of the form tcp://host:port")
        loop = asyncio.get_running_loop()
        channel = TcpChannel(address, self._offer(), self._timing())
        try:
            async with asyncio.timeout(self.connect_timeout):
                await loop.create_connection(
                    lambda: channel, url.hostname, url.port, ssl=client_context(self.tls) if self.tls else None,
                    server_hostname=(self.tls.server_name or url.hostname) if self.tls else None)
                await channel.ready
        except TimeoutError:
            await channel.close()
            raise CannotConnect(f"{address}: no answer within {self.connect_timeout:g} s") from None
        except (OSError, ConfigError) as e:
            raise CannotConnect(f"{address}: {e}") from e
        except asyncio.CancelledError:
            await channel.close()
            raise
        return channel

    def _offer(self) -> Hello:
        return Hello(max_frame_bytes=self.max_frame_bytes, max_streams=self.max_streams, window_items=self.window_items, window_bytes=self.window_bytes)

    def _timing(self) -> Timing:
        return Timing(self.connect_timeout, self.ping_interval, self.ping_timeout)
