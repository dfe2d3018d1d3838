"""Events over ZeroMQ, without a broker: every publisher binds a socket and advertises it in discovery."""

from __future__ import annotations

import asyncio
from socket import SOCK_STREAM
from typing import Literal

import attrs
import zmq
from attrs import validators as v

from dynamo_core.config.schema import Secret
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.events.contract import EventContext
from dynamo_core.events.zmq_outlet import Outlet, ZmqPublisher
from dynamo_core.events.zmq_subscription import ZmqSubscription

_LARGEST_FROM_SUBSCRIBERS = 4096
"""Bytes. They send topic names and nothing else."""


def _is_curve_key(_: object, attribute: attrs.Attribute[Secret | None], value: Secret | None) -> None:
    try:
        if value is not None:
            zmq.curve_public(value.strip().encode())
    except (ValueError, zmq.ZMQError):
        raise ValueError(f"'{attribute.name}' must be a CURVE secret key, 40 characters of Z85") from None


@attrs.define(eq=False)
class ZmqEvents:
    """An event plane of PUB and SUB sockets. At most once: what a full queue or a broken connection loses is known by its number."""

    bind: str | None = None
    """The local address to listen on, when it is not the one that peers use (`host`): `0.0.0.0` behind a NAT."""
    port: int = attrs.field(default=0, validator=[v.ge(0), v.le(65535)])
    """0: any free port."""
    send_queue: int = attrs.field(default=100_000, validator=v.ge(1))
    """Events that wait for one subscriber that does not read from its connection."""
    receive_queue: int = attrs.field(default=100_000, validator=v.ge(1))
    """Events that wait for one slow subscriber; past that it loses the oldest and is told so."""
    curve_secret_key: Secret | None = attrs.field(default=None, validator=_is_curve_key, repr=False)
    """One key for the whole fleet: with it everything is encrypted, and nobody listens or speaks without it."""

    guarantee: Literal["at-most-once"] = attrs.field(init=False, default="at-most-once", repr=False)
    _context: EventContext | None = attrs.field(init=False, default=None, repr=False)
    _sockets: zmq.Context[zmq.Socket[bytes]] | None = attrs.field(init=False, default=None, repr=False)
    _outlet: Outlet | None = attrs.field(init=False, default=None, repr=False)
    _listen: str = attrs.field(init=False, default="", repr=False)
    _subscriptions: set[ZmqSubscription] = attrs.field(init=False, factory=set, repr=False)

    async def start(self, context: EventContext) -> None:
        self._listen = await _numeric(self.bind or context.host)
        self._context = context
        self._sockets = zmq.Context()

    async def publisher(self, topic: str) -> ZmqPublisher:
        context, sockets = self._started()
        if self._outlet is None:
            self._outlet = self._bind(sockets.socket(zmq.XPUB), context)
        return await self._outlet.advertise(topic)

    async def subscribe(self, topic: str) -> ZmqSubscription:
        context, sockets = self._started()
        socket = sockets.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, self.receive_queue)
        socket.setsockopt(zmq.IPV6, 1)
        self._encrypt(socket, server=False)
        subscription = ZmqSubscription(socket, context.discovery, topic, self.receive_queue, self._subscriptions.discard)
        self._subscriptions.add(subscription)
        await subscription.connected()
        return subscription

    async def stop(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        if self._outlet is not None:
            await self._outlet.close()
            self._outlet = None
        if self._sockets is not None:
            self._sockets.destroy(linger=0)
            self._sockets = None

    def problem(self) -> str | None:
        return "; ".join(filter(None, (subscription.problem() for subscription in self._subscriptions))) or None

    def _started(self) -> tuple[EventContext, zmq.Context[zmq.Socket[bytes]]]:
        if self._context is None or self._sockets is None:
            raise RuntimeError("the zmq event plane is used before start() or after stop()")
        return self._context, self._sockets

    def _bind(self, socket: zmq.Socket[bytes], context: EventContext) -> Outlet:
        socket.setsockopt(zmq.SNDHWM, self.send_queue)
        socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_FROM_SUBSCRIBERS)
        socket.setsockopt(zmq.IPV6, int(":" in self._listen))
        self._encrypt(socket, server=True)
        address = f"tcp://{_bracketed(self._listen)}:{self.port or '*'}"
        try:
            socket.bind(address)
        except zmq.ZMQError as e:
            socket.close(linger=0)
            raise _cannot_listen(address, str(e)) from e
        port = socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        return Outlet(socket, f"tcp://{_bracketed(context.host)}:{port}", context.discovery, context.lease)

    def _encrypt(self, socket: zmq.Socket[bytes], *, server: bool) -> None:
        if self.curve_secret_key is None:
            return
        secret = self.curve_secret_key.strip().encode()
        # One key pair is everybody's: whoever does not hold it knows neither half, and a peer must know the public half to connect at all.
        public = zmq.curve_public(secret)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        if server:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
        else:
            socket.setsockopt(zmq.CURVE_SERVERKEY, public)


async def _numeric(host: str) -> str:
    """ZeroMQ binds to numbers only."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=SOCK_STREAM)
    except OSError as e:
        raise _cannot_listen(host, e.strerror or str(e)) from e
    return str(found[0][4][0])


def _cannot_listen(address: str, because: str) -> ConfigError:
    return ConfigError(Problem(f"the zmq event plane cannot listen on {address}: {because}", remedy="set event_plane.bind to an address of this machine"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
