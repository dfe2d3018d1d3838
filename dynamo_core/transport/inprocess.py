"""The `in-process` request plane: streams inside one process, with the guarantees of a network and none of its cost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable

import attrs
from attrs import validators as v

from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, CannotConnect, Disconnected, DynamoError, from_wire, to_wire
from dynamo_core.transport.contract import Channel, Handler, Item, Server
from dynamo_core.transport.mailbox import BoundedMailbox
from dynamo_core.transport.serving import ended, relay

_servers: dict[str, InProcessServer] = {}
"""Who serves, by address. Of the process: planes of different runtimes find each other here."""
_numbers = itertools.count(1)


@attrs.frozen
class InProcessPlane:
    """Serve and call inside one process. Nothing is serialised, and nothing is shared but the items themselves."""

    window_items: int = attrs.field(default=1024, validator=v.ge(1))
    """Unread items of one stream, past which its handler is not asked for more."""
    window_bytes: int = attrs.field(default=4 * 2**20, validator=v.ge(1))
    """The same in bytes, of streams that carry bytes; one item may exceed it."""

    scheme = "inproc"

    async def serve(self, handler: Handler, host: str) -> Server:
        server = InProcessServer(handler, f"inproc://{host or 'local'}-{next(_numbers)}", self.window_items, self.window_bytes)
        _servers[server.address] = server
        return server

    async def connect(self, address: str) -> Channel:
        if (server := _servers.get(address)) is None:
            raise CannotConnect(f"{address}: nobody serves that address in this process")
        channel = InProcessChannel(server)
        server.channels.add(channel)
        return channel


class InProcessServer:
    def __init__(self, handler: Handler, address: str, window_items: int, window_bytes: int) -> None:
        self.address = address
        self.handler = handler
        self.window_items = window_items
        self.window_bytes = window_bytes
        self.channels: set[InProcessChannel] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        _servers.pop(self.address, None)
        for channel in list(self.channels):
            channel.drop(f"{self.address} was closed")
        await ended(self.tasks)


class InProcessChannel:
    def __init__(self, server: InProcessServer) -> None:
        self.server = server
        self.streams: set[InProcessStream] = set()
        self.closed = False

    def open(self, endpoint: str, payload: bytes, context: Context) -> InProcessStream:
        stream = InProcessStream(self, context)
        if self.closed:
            stream.finish(Disconnected(f"the connection to {self.server.address} is closed"))
            return stream
        stream.follow(context)
        if not context.cancelled:
            stream.start(endpoint, payload)
        return stream

    def drop(self, reason: str) -> None:
        self.closed = True
        self.server.channels.discard(self)
        for stream in list(self.streams):
            stream.finish(Disconnected(reason))
            stream.stop("the caller disconnected")

    async def close(self) -> None:
        self.drop(f"the connection to {self.server.address} was closed here")


class InProcessStream(BoundedMailbox):
    """Both ends of one stream: the mailbox, and the task that fills it."""

    __slots__ = ("_channel", "_context", "_task")

    def __init__(self, channel: InProcessChannel, context: Context) -> None:
        super().__init__(channel.server.window_items, channel.server.window_bytes)
        self._channel = channel
        # The far side has its own context, as on any other plane: cancelling it there does not cancel the caller's.
        self._context = Context(context.id, deadline=context.deadline, priority=context.priority, session=context.session,
                                tenant=context.tenant, traceparent=context.traceparent)
        self._task: asyncio.Task[None] | None = None

    def start(self, endpoint: str, payload: bytes) -> None:
        server = self._channel.server
        self._task = asyncio.get_running_loop().create_task(self._run(server.handler, endpoint, payload), name=f"stream {self._context.id}")
        server.tasks.add(self._task)
        self._task.add_done_callback(server.tasks.discard)
        self._channel.streams.add(self)

    async def _run(self, handler: Handler, endpoint: str, payload: bytes) -> None:
        error = await relay(handler, endpoint, payload, self._context, self._send)
        self._channel.streams.discard(self)
        self.finish(None if error is None else _as_peer_sees(error))

    def _send(self, item: Item) -> Awaitable[None] | None:
        if self._finished:
            raise Cancelled("nobody listens any more")
        self.put(item)
        return self.wait_for_room() if self.full else None

    def cancelled(self) -> None:
        self.stop("the caller cancelled")

    def stop(self, reason: str) -> None:
        self._channel.streams.discard(self)
        self._context.cancel(reason)
        if self._task is not None:
            self._task.cancel()


def _as_peer_sees(error: BaseException) -> DynamoError:
    return error if isinstance(error, Cancelled) else from_wire(*to_wire(error))
