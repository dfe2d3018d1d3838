"""The serving end of a `tcp` connection: runs a handler for each stream, and sends what all of them yield in one loop turn as one frame."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, EngineFailed, ProtocolViolation, WorkerOverloaded, to_wire
from dynamo_core.transport import frames
from dynamo_core.transport.connection import Connection, Timing
from dynamo_core.transport.contract import Handler, Item
from dynamo_core.transport.frames import Cancel, Credit, Data, End, Failure, Hello, Open, Outputs, ToServer
from dynamo_core.transport.serving import ended, relay
from dynamo_core.types import Output

BATCH_ITEMS = 1024
"""Items of one loop turn after which handlers wait for the turn to end: one that never waits must not stop the loop."""
BATCH_BYTES = 1024 * 1024


class ServedStream:
    """One stream while its handler runs."""

    __slots__ = ("_connection", "_gate", "byte_credit", "context", "credit", "gone", "id", "task")

    def __init__(self, connection: TcpServerConnection, number: int, context: Context, hello: Hello) -> None:
        self.id = number
        self.context = context
        self.credit = hello.window_items
        self.byte_credit = hello.window_bytes
        self.gone = False
        """Nobody listens any more: neither items nor an end are sent."""
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._gate: asyncio.Future[None] | None = None

    async def run(self, handler: Handler, endpoint: str, payload: bytes) -> None:
        error = await relay(handler, endpoint, payload, self.context, self.send)
        if not self.gone:
            self._connection.finish(self, None if error is None else to_wire(error))

    def send(self, item: Item) -> Awaitable[None] | None:
        connection = self._connection
        if self.gone:
            raise Cancelled(self.context.cancel_reason or "nobody listens any more")
        self.credit -= 1
        if isinstance(item, Output):
            connection.add(self.id, item)
        else:
            self.byte_credit -= len(item)
            connection.add_bytes(self.id, item)
        return self._wait() if self.credit <= 0 or self.byte_credit <= 0 or connection.full else None

    async def _wait(self) -> None:
        while self.credit <= 0 or self.byte_credit <= 0 or self._connection.full:
            self._gate = asyncio.get_running_loop().create_future()
            await self._gate

    def wake(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None and not gate.done():
            gate.set_result(None)

    def stop(self, reason: str) -> None:
        """Nobody wants the rest: the iterator is closed."""
        self.gone = True
        self.context.cancel(reason)
        if self.task is not None:
            self.task.cancel()


class TcpServerConnection(Connection):
    decoder = frames.to_server
    role = "caller"

    def __init__(self, server: TcpServer, offer: Hello, timing: Timing) -> None:
        super().__init__(offer, timing)
        self.tasks: set[asyncio.Task[None]] = set()
        self.full = False
        """Handlers are not asked for more: the socket or this turn's batch has enough."""
        self._server = server
        self._streams: dict[int, ServedStream] = {}
        self._ids: list[int] = []
        self._outputs: list[Output] = []
        self._followed: set[int] = set()
        """Streams with a frame in `_after` that a later output must not overtake."""
        self._after: list[bytearray] = []
        self._backlog = 0
        self._backlog_bytes = 0
        self._last = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)
        if self._server.closing:
            self.hang_up("the worker is closing")

    # ------------------------------------------------------------------ out

    def add(self, number: int, output: Output) -> None:
        if self._followed and number in self._followed:
            self.seal()
        self._ids.append(number)
        self._outputs.append(output)
        self._backlog += 1
        if self._backlog >= BATCH_ITEMS:
            self.full = True
        if not self._flushing:
            self.schedule()

    def add_bytes(self, number: int, item: bytes) -> None:
        """:raises EngineFailed: the item is over the peer's limit."""
        frame = frames.encode(Data(number, item))
        limit = self.hello.max_frame_bytes if self.hello else 0
        if len(frame) - frames.HEADER > limit:
            raise EngineFailed(f"an item of {len(item)} bytes is over the caller's limit of {limit}")
        self._follow(number, frame)
        self._backlog += 1
        self._backlog_bytes += len(frame)
        if self._backlog >= BATCH_ITEMS or self._backlog_bytes >= BATCH_BYTES:
            self.full = True

    def finish(self, stream: ServedStream, error: tuple[str, str] | None) -> None:
        self._streams.pop(stream.id, None)
        if not self.closed:
            self._follow(stream.id, frames.encode(End(stream.id) if error is None else Failure(stream.id, *error)))

    def _follow(self, number: int, frame: bytearray) -> None:
        """Send a frame behind the outputs of this turn, whose batch stays open for other streams."""
        self._followed.add(number)
        self._after.append(frame)
        self.schedule()

    def seal(self) -> None:
        if self._ids:
            ids, self._ids = self._ids, []
            outputs, self._outputs = self._outputs, []
            self._encode(ids, outputs)
        if self._after:
            self._out += self._after
            self._after.clear()
            self._followed.clear()

    def _encode(self, ids: list[int], outputs: list[Output]) -> None:
        frame = frames.encode(Outputs(ids, outputs))
        limit = self.hello.max_frame_bytes if self.hello else 0
        if len(frame) - frames.HEADER <= limit:
            self._out.append(frame)
        elif len(ids) > 1:
            half = len(ids) // 2
            self._encode(ids[:half], outputs[:half])
            self._encode(ids[half:], outputs[half:])
        else:  # its handler may have ended since: the caller drops what follows the failure
            self._out.append(frames.encode(Failure(ids[0], EngineFailed.code, f"an output of {len(frame)} bytes is over the caller's limit of {limit}")))
            if (stream := self._streams.pop(ids[0], None)) is not None:
                stream.stop("an output is over the caller's limit")

    def flush(self) -> None:
        super().flush()
        self._backlog = self._backlog_bytes = 0
        if self.full:
            self._make_room()

    def writable(self) -> None:
        self._make_room()

    def _make_room(self) -> None:
        self.full = self.paused
        if not self.full:
            for stream in self._streams.values():
                stream.wake()

    # ------------------------------------------------------------------ in

    def received(self, frame: ToServer) -> None:
        if type(frame) is Open:
            self._open(frame)
        elif type(frame) is Cancel:
            if (stream := self._streams.pop(frame.stream, None)) is not None:
                stream.stop("the caller cancelled")
        elif type(frame) is Credit:
            if frame.items < 0 or frame.bytes < 0:
                raise ProtocolViolation("it took credit back")
            if (stream := self._streams.get(frame.stream)) is not None:
                stream.credit += frame.items
                stream.byte_credit += frame.bytes
                stream.wake()

    def _open(self, frame: Open) -> None:
        if frame.stream <= self._last:
            raise ProtocolViolation(f"it opened stream {frame.stream} after stream {self._last}")
        self._last = frame.stream
        if len(self.tasks) >= self.offer.max_streams:
            full = WorkerOverloaded(f"this connection has {len(self.tasks)} streams already, its limit")
            self.post(Failure(frame.stream, *to_wire(full)))
            return
        assert self.hello is not None
        deadline = None if frame.remaining is None else time.monotonic() + frame.remaining
        context = Context(frame.request, deadline=deadline, priority=frame.priority, session=frame.session, tenant=frame.tenant, traceparent=frame.traceparent)
        stream = self._streams[frame.stream] = ServedStream(self, frame.stream, context, self.hello)
        stream.task = task = self._loop.create_task(stream.run(self._server.handler, frame.endpoint, frame.payload), name=f"stream {frame.request}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def lost(self, reason: str) -> None:
        self._server.connections.discard(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.stop("the caller disconnected")


class TcpServer:
    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections: set[TcpServerConnection] = set()
        self.closing = False
        self.address = ""
        self._listener: asyncio.Server | None = None

    def listening(self, listener: asyncio.Server, address: str) -> None:
        self._listener = listener
        self.address = address

    async def close(self) -> None:
        self.closing = True
        if self._listener is not None:
            self._listener.close()
        tasks = [task for connection in self.connections for task in connection.tasks]
        for connection in list(self.connections):
            connection.hang_up("the worker closed the connection")
        await ended(tasks)
