"""The serving end of the `http` plane: HTTP/1.1 by h11, a handler for each request, its items as frames in a chunked response."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable
from urllib.parse import unquote

import h11

from dynamo_core.context import Context
from dynamo_core.errors import BodyTooLarge, Cancelled, WorkerOverloaded, to_wire
from dynamo_core.transport import frames
from dynamo_core.transport.contract import Handler, Item
from dynamo_core.transport.frames import Data, End, Failure, Outputs, Ping
from dynamo_core.transport.serving import ended, relay
from dynamo_core.types import Output

log = logging.getLogger(__name__)

BATCH_ITEMS = 256
"""Items of one loop turn after which the handler waits for the turn to end."""
WRITE_BUFFER = 256 * 1024
"""Bytes that may wait for the socket before the handler is not asked for more."""


class HttpServer:
    def __init__(self, handler: Handler, max_frame_bytes: int, max_streams: int, request_timeout: float, ping_interval: float) -> None:
        self.handler = handler
        self.max_frame_bytes = max_frame_bytes
        self.max_streams = max_streams
        self.request_timeout = request_timeout
        self.ping_interval = ping_interval
        self.running = 0
        self.address = ""
        self._closing = False
        self._connections: dict[asyncio.Task[None], HttpConnection] = {}

    def listening(self, listener: asyncio.Server, address: str) -> None:
        self._listener = listener
        self.address = address

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing:
            writer.transport.abort()
            return
        connection = HttpConnection(self, reader, writer)
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    async def close(self) -> None:
        self._closing = True
        self._listener.close()
        tasks = list(self._connections)
        for connection in self._connections.values():
            connection.abort()
        await ended(tasks)


class HttpConnection:
    """One caller's connection: requests one after another."""

    def __init__(self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)
        writer.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        name = writer.get_extra_info("peername")
        self._peer = f"{name[0]}:{name[1]}" if name else "?"

    def abort(self) -> None:
        self._writer.transport.abort()

    async def run(self) -> None:
        try:
            while await self._serve_one():
                self._http.start_next_cycle()
        except h11.RemoteProtocolError as e:
            log.warning("dropped the caller at %s: %s", self._peer, e)
            self._refuse(400, str(e))
        except TimeoutError:
            if self._http.their_state is not h11.IDLE or self._http.trailing_data[0]:
                log.warning("dropped the caller at %s: its request did not arrive within %g s", self._peer, self._server.request_timeout)
        except OSError:
            pass  # it went away between two requests
        finally:
            self._writer.close()

    async def _serve_one(self) -> bool:
        """Serve one request; true when another may follow on this connection."""
        try:
            async with asyncio.timeout(self._server.request_timeout):
                received = await self._receive()
        except BodyTooLarge as e:
            log.warning("refused a request of the caller at %s: %s", self._peer, e)
            self._refuse(413, str(e), e.code)
            await self._discard()
            return False
        if received is None:
            return False
        request, payload = received
        if request.method == b"GET" and request.target == b"/":
            self._refuse(200, f"dynamo {frames.VERSION}")
        elif request.method != b"POST":
            self._refuse(405, "POST /<endpoint>, or GET / for the version")
        else:
            await self._stream(request, payload)
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _receive(self) -> tuple[h11.Request, bytes] | None:
        request: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    self._write(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(await self._reader.read(256 * 1024))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._server.max_frame_bytes:
                    raise BodyTooLarge(f"it is over the limit of {self._server.max_frame_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                return request, bytes(body)
            else:
                return None

    def _refuse(self, status: int, text: str, code: str | None = None) -> None:
        """Answer without a stream, where an answer is still possible."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = text.encode()
        headers = [("content-type", "text/plain"), ("content-length", str(len(body))), *([("dynamo-error", code)] if code else [])]
        if status >= 400:
            headers.append(("connection", "close"))
        self._write(h11.Response(status_code=status, headers=headers))
        self._write(h11.Data(data=body))
        self._write(h11.EndOfMessage())

    async def _discard(self) -> None:
        """Read what the caller still sends: closing at once would reset the connection, and it would never see the answer."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(self._server.request_timeout):
                while await self._reader.read(256 * 1024):
                    pass

    def _write(self, event: h11.Event) -> None:
        if (data := self._http.send(event)) and not self._writer.is_closing():  # type: ignore[arg-type]
            self._writer.write(data)

    # ------------------------------------------------------------------ one stream

    async def _stream(self, request: h11.Request, payload: bytes) -> None:
        server = self._server
        self._write(h11.Response(status_code=200, headers=[("content-type", "application/x-dynamo-frames"), ("cache-control", "no-store, no-transform")]))
        if server.running >= server.max_streams:
            self._finish(Failure(1, *to_wire(WorkerOverloaded(f"{server.address} has {server.running} streams already, its limit"))))
            return
        server.running += 1
        context = context_of(request)
        response = _Response(self, server)
        serving = asyncio.create_task(relay(server.handler, unquote(request.target.decode("ascii", "replace").lstrip("/")), payload, context, response.send))
        watching = asyncio.create_task(self._left())
        try:
            await asyncio.wait((serving, watching), return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                response.gone = True
                context.cancel("the caller disconnected")
                serving.cancel()
                self.abort()
            await asyncio.wait((serving,))
            if not response.gone:
                error = serving.result()
                response.flush()
                self._finish(End(1) if error is None else Failure(1, *to_wire(error)))
        finally:
            server.running -= 1
            response.close()
            if not watching.done():
                watching.cancel()
            await asyncio.wait((watching,))

    async def _left(self) -> None:
        """Return when the caller has gone. One that waits for its answer sends nothing, so whatever can be read ends it."""
        try:
            await self._reader.read(1)
        except OSError:
            pass

    def _finish(self, frame: End | Failure) -> None:
        self._write(h11.Data(data=bytes(frames.encode(frame))))
        self._write(h11.EndOfMessage())

    def send_frames(self, data: bytes) -> None:
        self._write(h11.Data(data=data))

    @property
    def congested(self) -> bool:
        return self._writer.transport.get_write_buffer_size() > WRITE_BUFFER

    async def drain(self) -> None:
        await asyncio.sleep(0)
        try:
            await self._writer.drain()
        except OSError:
            await asyncio.Event().wait()  # the caller left: `_stream` sees it, and cancels


class _Response:
    """The items of one stream on their way out: those of one loop turn travel in one chunk."""

    def __init__(self, connection: HttpConnection, server: HttpServer) -> None:
        self.gone = False
        self._connection = connection
        self._interval = server.ping_interval
        self._loop = asyncio.get_running_loop()
        self._pending: list[Item] = []
        self._flush: asyncio.Handle | None = None
        self._quiet = True
        self._timer = self._loop.call_later(self._interval, self._tick)

    def send(self, item: Item) -> Awaitable[None] | None:
        if self.gone:
            raise Cancelled("the caller disconnected")
        self._pending.append(item)
        if self._flush is None:
            self._flush = self._loop.call_soon(self.flush)
        if not isinstance(item, Output) or len(self._pending) >= BATCH_ITEMS or self._connection.congested:
            return self._connection.drain()
        return None

    def flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        pending, self._pending = self._pending, []
        if not pending or self.gone:
            return
        self._quiet = False
        data = bytearray()
        outputs: list[Output] = []
        for item in pending:
            if isinstance(item, Output):
                outputs.append(item)
                continue
            if outputs:
                data += frames.encode(Outputs([1] * len(outputs), outputs))
                outputs = []
            data += frames.encode(Data(1, item))
        if outputs:
            data += frames.encode(Outputs([1] * len(outputs), outputs))
        self._connection.send_frames(bytes(data))

    def close(self) -> None:
        self._timer.cancel()
        if self._flush is not None:
            self._flush.cancel()

    def _tick(self) -> None:
        if self._quiet and not self.gone:
            self._connection.send_frames(bytes(frames.encode(Ping())))
        self._quiet = True
        self._timer = self._loop.call_later(self._interval, self._tick)


def context_of(request: h11.Request) -> Context:
    """The context that the caller's headers describe; what is malformed counts as absent."""
    headers = {name.decode("ascii"): unquote(value.decode("latin-1")) for name, value in request.headers}

    def number(name: str) -> float | None:
        try:
            value = float(headers[name])
        except (KeyError, ValueError):
            return None
        return value if math.isfinite(value) else None

    remaining = number("dynamo-remaining")
    return Context(headers.get("dynamo-request-id", ""), deadline=None if remaining is None else time.monotonic() + remaining,
                   priority=int(number("dynamo-priority") or 0), session=headers.get("dynamo-session"), tenant=headers.get("dynamo-tenant"),
                   traceparent=headers.get("traceparent"))
