"""One connection to NATS, with the options that every component of this plugin shares."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
from attrs import validators as v
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import AuthorizationError
from nats.errors import Error as NatsError

from dynamo_core.config.schema import Secret
from dynamo_core.ending import ended
from dynamo_core.errors import ConfigError, Problem

log = logging.getLogger(__name__)

_RECONNECT_WAIT = 0.2
"""Seconds between two attempts to reach one server."""
_FAREWELL = 2.0
"""Seconds for which what was sent last may still leave."""


@attrs.frozen
class NatsTls:
    """For servers that speak TLS."""

    ca: Path
    """Who signed the certificates of the servers."""
    cert: Path | None = None
    """This process's certificate, where servers ask for one (`verify: true`)."""
    key: Path | None = None
    """Its private key, unencrypted."""
    server_name: str | None = None
    """The name in the servers' certificates, where they are reached by an address that the certificates do not list."""


@attrs.define(eq=False, kw_only=True)
class NatsOptions:
    """Where NATS is, and who we are."""

    servers: tuple[str, ...] = attrs.field(default=("nats://127.0.0.1:4222",), validator=v.min_len(1))
    """Some members of the cluster; the others are learnt from them."""
    prefix: str = attrs.field(default="dynamo", validator=v.matches_re(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"))
    """What all subjects of the fleet begin with."""
    user: str | None = None
    """With `password`."""
    password: Secret | None = attrs.field(default=None, repr=False)
    """As `file:/path` or `env:NAME`."""
    token: Secret | None = attrs.field(default=None, repr=False)
    """Instead of a user."""
    nkey_seed: Secret | None = attrs.field(default=None, repr=False)
    """The seed of a user nkey, instead of a user."""
    creds: Path | None = None
    """A `.creds` file (JWT and seed), instead of a user. It is read again at every connection."""
    tls: NatsTls | None = None
    """Certificates; with it, servers must speak TLS."""
    connect_timeout: float = attrs.field(default=3.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds in which one of the servers must have let us in."""


class Connection:
    """Sends in order without blocking; reconnects by itself. `on_up` and `on_down` are called at each change.

    While NATS is away, what is sent waits: at most `limit` messages, of which the oldest are dropped.
    """

    def __init__(self, options: NatsOptions, name: str, limit: int) -> None:
        self.name = name
        self.on_up: list[Callable[[], None]] = []
        self.on_down: list[Callable[[], None]] = []
        self._options = options
        self._limit = limit
        self._client = Client()
        self._up = asyncio.Event()
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sender: asyncio.Task[None] | None = None
        self._reviver: asyncio.Task[None] | None = None
        self._secure: ssl.SSLContext | None = None
        self._receivers: dict[int, tuple[str, Callable[[Msg], None], Subscription]] = {}
        self._numbers = 0
        self._last_error: BaseException | None = None
        self._denied: asyncio.Future[None] | None = None
        self._closing = False

    # ------------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """:raises ConfigError: the servers do not let us in. :raises ConnectionError: none of them answers."""
        await self._connect()
        self._sender = asyncio.create_task(self._keep_sending(), name=f"{self.name}: send")

    async def close(self) -> None:
        self._closing = True
        with contextlib.suppress(TimeoutError, NatsError):
            async with asyncio.timeout(_FAREWELL):
                if self.up:
                    await self._idle.wait()
                    await self._client.flush()
        await ended(self._sender, self._reviver)
        self._up.clear()
        await self._client.close()

    async def _connect(self) -> None:
        options = self._options
        self._denied = asyncio.get_running_loop().create_future()
        self._last_error = None
        client = self._client = Client()
        connecting = asyncio.ensure_future(client.connect(
            list(options.servers), name=self.name, connect_timeout=max(1, int(options.connect_timeout)), reconnect_time_wait=_RECONNECT_WAIT,  # pyright: ignore[reportArgumentType]
            max_reconnect_attempts=-1, ping_interval=5, max_outstanding_pings=2, error_cb=self._error, disconnected_cb=self._disconnected,
            reconnected_cb=self._reconnected, closed_cb=self._closed, user=options.user, password=options.password, token=options.token,
            nkeys_seed_str=options.nkey_seed, user_credentials=str(options.creds) if options.creds else None,
            tls=self._context(), tls_hostname=options.tls.server_name if options.tls else None))  # pyright: ignore[reportArgumentType]
        try:
            await asyncio.wait([connecting, self._denied], timeout=options.connect_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                where = ", ".join(options.servers)
                if self._denied.done():
                    raise ConfigError(Problem(f"NATS at {where} does not let us in: {self._last_error}",
                                              remedy="check user, password, token, nkey_seed or creds"))
                raise ConnectionError(f"NATS at {where} does not answer within {options.connect_timeout:g} s: {self._last_error or 'silence'}")
            connecting.result()
        except BaseException:
            await self._give_up(client, connecting)
            raise
        self._up.set()

    async def _give_up(self, client: Client, connecting: asyncio.Future[None]) -> None:
        """The client swallows a cancellation that meets it in a handshake, and would try for ever: take its servers away as well."""
        client.options["max_reconnect_attempts"] = 0
        client.options["allow_reconnect"] = False
        client._server_pool.clear()  # pyright: ignore[reportPrivateUsage]
        client._closed_cb = None  # pyright: ignore[reportPrivateUsage]
        for _ in range(10):
            connecting.cancel()
            if (await asyncio.wait([connecting], timeout=_FAREWELL / 10))[0]:
                break
        if connecting.done() and not connecting.cancelled():
            connecting.exception()
        with contextlib.suppress(TimeoutError, NatsError, OSError):
            async with asyncio.timeout(_FAREWELL):
                await client.close()

    def _context(self) -> ssl.SSLContext | None:
        tls = self._options.tls
        if tls is None:
            return None
        try:  # again before each connection: renewed files are used from then on
            secure = ssl.create_default_context(cafile=tls.ca)
            if tls.cert is not None:
                secure.load_cert_chain(tls.cert, tls.key)
            self._secure = secure
        except (OSError, ssl.SSLError) as e:
            if not self._up.is_set() and self._sender is None:
                raise ConfigError(Problem(f"the tls files of NATS cannot be used: {e}")) from e
            log.warning("renewed tls files cannot be used, the old ones stay: %s", e)
        return self._secure

    # ------------------------------------------------------------------ state

    @property
    def up(self) -> bool:
        return self._up.is_set()

    @property
    def largest(self) -> int:
        """Bytes that one message may have."""
        return self._client.max_payload

    def problem(self) -> str | None:
        if self.up:
            return None
        return f"no connection to NATS at {', '.join(self._options.servers)}" + (f": {self._last_error}" if self._last_error else "")

    @property
    def client(self) -> Client:
        return self._client

    # ------------------------------------------------------------------ messages

    def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send with whatever else becomes ready in this loop turn."""
        if len(self._out) >= self._limit:
            self._out.popleft()
        self._out.append((subject, data, reply))
        if not self._wake.is_set():
            self._wake.set()

    async def subscribe(self, subject: str, receive: Callable[[Msg], None]) -> int:
        """Returns once the server knows. `receive` must not raise."""
        self._numbers += 1
        self._receivers[self._numbers] = subject, receive, await self._client.subscribe(subject, cb=_caller(receive))
        if self.up:
            with contextlib.suppress(NatsError, TimeoutError):
                await self._client.flush(timeout=2)
        return self._numbers

    async def unsubscribe(self, number: int) -> None:
        _, _, subscription = self._receivers.pop(number)
        with contextlib.suppress(NatsError):
            await subscription.unsubscribe()

    async def _keep_sending(self) -> None:
        while True:
            self._idle.set()
            await self._wake.wait()
            self._idle.clear()
            self._wake.clear()
            while self._out:
                await self._up.wait()
                subject, data, reply = self._out.popleft()
                try:
                    await self._client.publish(subject, data, reply)
                except NatsError as e:
                    log.debug("a message to %s was lost: %r", subject, e)

    # ------------------------------------------------------------------ what the client tells

    async def _error(self, error: Exception) -> None:
        self._last_error = error
        if isinstance(error, AuthorizationError) or "authorization" in str(error).lower():
            if self._denied is not None and not self._denied.done():
                self._denied.set_result(None)
        elif "permissions violation" in str(error).lower():
            log.warning("NATS does not allow what we need: %s", error)

    async def _disconnected(self) -> None:
        if self.up:
            self._up.clear()
            if not self._closing:
                log.warning("lost NATS: %s", self._last_error or "the connection ended")
            for tell in self.on_down:
                tell()
        if self._secure is not None:
            self._client.options["tls"] = self._context()

    async def _reconnected(self) -> None:
        self._last_error = None
        self._up.set()
        log.warning("NATS is back at %s", self._client.connected_url.netloc if self._client.connected_url else "?")
        for tell in self.on_up:
            tell()

    async def _closed(self) -> None:
        """The client has given up (a server that restarted with other users, say). We have not."""
        if not self._closing and self._sender is not None and (self._reviver is None or self._reviver.done()):
            self._up.clear()
            self._reviver = asyncio.create_task(self._revive(), name=f"{self.name}: connect again")

    async def _revive(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                await self._connect()
                for number, (subject, receive, _) in list(self._receivers.items()):
                    self._receivers[number] = subject, receive, await self._client.subscribe(subject, cb=_caller(receive))
                await self._reconnected()
                return
            except (NatsError, ConfigError, OSError) as e:
                self._last_error = e


def _caller(receive: Callable[[Msg], None]) -> Callable[[Msg], Awaitable[None]]:
    async def call(message: Msg) -> None:
        try:
            receive(message)
        except Exception:
            log.exception("a message on %s was not understood", message.subject)

    return call


def nobody_there(message: Msg) -> bool:
    """Whether this is the server's word that a message of ours, which named this subject for replies, reached nobody."""
    return not message.data and message.headers is not None and message.headers.get("Status") == "503"
