"""The `http` request plane: one HTTP/1.1 request for each stream, for networks that allow nothing else."""

from __future__ import annotations

import asyncio
import socket

import attrs
import httpx
from attrs import validators as v

from dynamo_core.errors import CannotConnect, ConfigError
from dynamo_core.httpx_client import HttpClient
from dynamo_core.transport.contract import Channel, Handler, Server
from dynamo_core.transport.http_client import HttpChannel
from dynamo_core.transport.http_server import HttpServer
from dynamo_core.transport.tls import PlaneTls, client_context, server_context


@attrs.frozen
class HttpPlane:
    """`POST /<endpoint>`, answered by a chunked stream of the frames that the `tcp` plane sends. Both sides are configured alike."""

    port: int = attrs.field(default=0, validator=[v.ge(0), v.le(65535)])
    """0: any free port."""
    tls: PlaneTls | None = None
    proxy: str | None = None
    """URL of a proxy through which callers go. The environment's proxy settings are not used: they are seldom meant for the fleet."""
    max_frame_bytes: int = attrs.field(default=64 * 2**20, validator=[v.ge(4096), v.lt(2**32)])
    """The largest request or item that this process receives."""
    max_streams: int = attrs.field(default=65536, validator=v.ge(1))
    """Of one worker; one more gets a migratable overload error."""
    window_items: int = attrs.field(default=1024, validator=v.ge(1))
    """Unread items of one stream, past which the caller stops reading its connection."""
    window_bytes: int = attrs.field(default=4 * 2**20, validator=v.ge(1))
    """The same in bytes, of streams that carry bytes."""
    connect_timeout: float = attrs.field(default=3.0, validator=v.gt(0))
    """Seconds, for the connection and the TLS handshake."""
    request_timeout: float = attrs.field(default=60.0, validator=v.gt(0))
    """Seconds within which a request has arrived whole; an idle connection is closed after as long."""
    ping_interval: float = attrs.field(default=2.5, validator=v.gt(0))
    """Seconds of silence after which a worker says that it is still there."""
    ping_timeout: float = attrs.field(default=5.0, validator=v.gt(0))
    """Seconds beyond that for which a caller waits before the worker counts as gone."""

    scheme = "http"

    async def serve(self, handler: Handler, host: str) -> Server:
        family, _, _, _, where = (await asyncio.get_running_loop().getaddrinfo(host, self.port, type=socket.SOCK_STREAM))[0]
        server = HttpServer(handler, self.max_frame_bytes, self.max_streams, self.request_timeout, self.ping_interval)
        listener = await asyncio.start_server(
            server.connected, str(where[0]), self.port, family=family, backlog=1024, ssl=server_context(self.tls) if self.tls else None,
            ssl_handshake_timeout=self.connect_timeout if self.tls else None)
        server.listening(listener, f"http://{f'[{host}]' if ':' in host else host}:{listener.sockets[0].getsockname()[1]}")
        return server

    async def connect(self, address: str) -> Channel:
        if not address.startswith("http://"):
            raise CannotConnect(f"{address}: not of the form http://host:port")
        try:
            client = HttpClient(
                base_url=address.replace("http://", "https://", 1) if self.tls else address, verify=client_context(self.tls) if self.tls else False,
                trust_env=False, proxy=self.proxy, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
                timeout=httpx.Timeout(self.ping_interval + self.ping_timeout, connect=self.connect_timeout, pool=None))
        except ConfigError as e:
            raise CannotConnect(f"{address}: {e}") from e
        channel = HttpChannel(address, client, self.max_frame_bytes, (self.window_items, self.window_bytes), self.tls.server_name if self.tls else None)
        try:
            await channel.greet(self.connect_timeout)
        except BaseException:
            await channel.close()
            raise
        return channel
