"""This process's address in NATS, and all the links that lead to and from it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import struct
from collections.abc import Callable

from nats.aio.msg import Msg

from dynamo_core.ending import ended
from dynamo_nats.connection import Connection, NatsOptions, nobody_there
from dynamo_nats.link import GONE, HEADER, OPEN, Link

log = logging.getLogger(__name__)

_CHECK = 0.25
"""Seconds between two rounds over the links."""
_UNLIMITED = 2**31
"""The windows of the links bound what waits."""


class Port:
    """Receives on `PREFIX.rpc.ID.*`: one token for each link, and one for each server."""

    def __init__(self, options: NatsOptions, heartbeat: float, lost_after: float) -> None:
        self.servers: dict[str, Callable[[], asyncio.Protocol]] = {}
        """By subject: what makes the serving end of a new link."""
        self.links: dict[str, Link] = {}
        self._id = secrets.token_hex(8)
        self._subject = f"{options.prefix}.rpc.{self._id}"
        self._heartbeat = heartbeat
        self._lost_after = lost_after
        self._connection = Connection(options, f"dynamo-rpc-{self._id}", _UNLIMITED)
        self._connection.on_up.append(self._back)
        self._beating: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """:raises ConfigError: NATS does not let us in. :raises ConnectionError: it does not answer."""
        await self._connection.open()
        await self._connection.subscribe(f"{self._subject}.*", self._receive)
        self._beating = asyncio.create_task(self._beat(), name="nats links: heartbeats")

    async def close(self) -> None:
        await ended(self._beating)
        for link in list(self.links.values()):
            link.abort()
        await self._connection.close()

    @property
    def idle(self) -> bool:
        return not self.servers and not self.links

    def problem(self) -> str | None:
        return self._connection.problem()

    def serve(self, accept: Callable[[], asyncio.Protocol]) -> str:
        """Returns the subject at which links can be asked for."""
        subject = f"{self._subject}.{secrets.token_hex(4)}"
        self.servers[subject] = accept
        return subject

    def dial(self, subject: str, protocol: asyncio.Protocol) -> Link:
        link = self._link(protocol)
        link.dial(subject)
        return link

    def _link(self, protocol: asyncio.Protocol) -> Link:
        name = f"{self._subject}.{secrets.token_hex(8)}"
        link = self.links[name] = Link(self._connection, name, protocol, self._lost_after, self._forget)
        return link

    def _forget(self, link: Link) -> None:
        self.links.pop(link.name, None)

    def _receive(self, message: Msg) -> None:
        link = self.links.get(message.subject)
        if nobody_there(message):
            if link is not None and self._connection.up:
                link.nobody()
            return
        try:
            if link is not None:
                link.received(message.data, message.reply)
                return
            kind, _, _ = HEADER.unpack_from(message.data)
        except struct.error:
            log.warning("dropped %d bytes on %s that are no message of a link", len(message.data), message.subject)
            return
        accept = self.servers.get(message.subject)
        if kind == OPEN and accept is not None and message.reply:
            self._link(accept()).accept(message.reply)
        elif kind != GONE and message.reply:
            self._connection.send(message.reply, HEADER.pack(GONE, 0, 0))

    def _back(self) -> None:
        for link in list(self.links.values()):
            link.carrier_is_back()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(min(_CHECK, self._heartbeat))
            if self._connection.up:
                for link in list(self.links.values()):
                    link.beat(self._heartbeat)
