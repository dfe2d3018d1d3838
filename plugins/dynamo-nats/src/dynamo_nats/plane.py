"""The `nats` request plane: the frames of the `tcp` plane, on links through NATS instead of connections."""

from __future__ import annotations

import asyncio

import attrs
from attrs import validators as v

from dynamo_core.errors import CannotConnect, ConfigError
from dynamo_core.transport.connection import Timing
from dynamo_core.transport.contract import Channel, Handler, Server
from dynamo_core.transport.frames import Hello
from dynamo_core.transport.tcp_client import TcpChannel
from dynamo_core.transport.tcp_server import TcpServer, TcpServerConnection
from dynamo_nats.connection import NatsOptions
from dynamo_nats.port import Port


class NatsChannel(TcpChannel):
    def __init__(self, plane: NatsPlane, address: str, offer: Hello, timing: Timing) -> None:
        super().__init__(address, offer, timing)
        self._plane = plane

    async def close(self) -> None:
        await super().close()
        await self._plane.leave()


class NatsServer(TcpServer):
    def __init__(self, plane: NatsPlane, handler: Handler) -> None:
        super().__init__(handler)
        self._plane = plane

    async def close(self) -> None:
        await self._plane.withdraw(self.address)
        await super().close()
        await self._plane.leave()


@attrs.define(eq=False, kw_only=True)
class NatsPlane(NatsOptions):
    """Streams through NATS: workers need no open port, and callers no route to them."""

    max_frame_bytes: int = attrs.field(default=64 * 2**20, validator=[v.ge(4096), v.lt(2**32)])
    """The largest request or item that this process receives. It travels in pieces that NATS allows."""
    max_streams: int = attrs.field(default=65536, validator=v.ge(1))
    """Of one pair of processes; one more gets a migratable overload error."""
    window_items: int = attrs.field(default=1024, validator=v.ge(1))
    """Items of one stream on the way or unread, past which its handler is not asked for more."""
    window_bytes: int = attrs.field(default=4 * 2**20, validator=v.ge(1))
    """The same in bytes, of streams that carry bytes; one item may exceed it."""
    heartbeat: float = attrs.field(default=0.5, validator=v.gt(0), metadata={"duration": True})
    """Seconds of silence after which a peer is told that we live. NATS answers at once when the peer is not there."""
    lost_after: float = attrs.field(default=1.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which a peer may be absent from NATS (it may be reconnecting) before its streams break."""
    ping_interval: float = attrs.field(default=5.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds of silence after which a peer that NATS still knows is asked whether it works."""
    ping_timeout: float = attrs.field(default=10.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds it has to answer. NATS may be away for as long, and no stream breaks."""

    scheme = "nats"

    _port: Port | None = attrs.field(init=False, default=None, repr=False)
    _opening: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)

    async def serve(self, handler: Handler, host: str) -> Server:
        """:param host: not used: NATS is what others reach."""
        server = NatsServer(self, handler)
        port = await self._enter()
        server.address = f"nats://{port.serve(lambda: TcpServerConnection(server, self._offer(), self._timing()))}"
        return server

    async def connect(self, address: str) -> Channel:
        scheme, _, subject = address.partition("://")
        if scheme != self.scheme or not subject:
            raise CannotConnect(f"{address}: not of the form nats://subject")
        try:
            port = await self._enter()
        except (OSError, ConfigError) as e:
            raise CannotConnect(f"{address}: {e}") from e
        channel = NatsChannel(self, address, self._offer(), self._timing())
        link = port.dial(subject, channel)
        try:
            async with asyncio.timeout(self.connect_timeout):
                await channel.ready
        except BaseException as e:
            link.abort()
            await self.leave()
            if isinstance(e, TimeoutError):
                raise CannotConnect(f"{address}: no answer within {self.connect_timeout:g} s") from None
            raise
        return channel

    async def withdraw(self, address: str) -> None:
        """No more links to this server; those that are there stay."""
        if self._port is not None:
            self._port.servers.pop(address.removeprefix("nats://"), None)

    async def leave(self) -> None:
        """Leave NATS when neither a server nor a channel needs it."""
        async with self._opening:
            if self._port is not None and self._port.idle:
                port, self._port = self._port, None
                await port.close()

    async def _enter(self) -> Port:
        async with self._opening:
            if self._port is None:
                port = Port(self, self.heartbeat, self.lost_after)
                await port.open()
                self._port = port
            return self._port

    def _offer(self) -> Hello:
        return Hello(max_frame_bytes=self.max_frame_bytes, max_streams=self.max_streams, window_items=self.window_items, window_bytes=self.window_bytes)

    def _timing(self) -> Timing:
        return Timing(self.connect_timeout, self.ping_interval, self.ping_timeout)
