"""The calling end of the `http` plane: a request for each stream, whose response is parsed into a mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import quote

import httpx
import msgspec

from dynamo_core.context import Context
from dynamo_core.errors import CannotConnect, Disconnected, DynamoError, ProtocolViolation, from_wire
from dynamo_core.transport import frames
from dynamo_core.transport.frames import Data, End, Failure, Outputs, Ping, Splitter
from dynamo_core.transport.mailbox import BoundedMailbox

GREETING = f"dynamo {frames.VERSION}"


class HttpChannel:
    def __init__(self, address: str, client: httpx.AsyncClient, max_frame_bytes: int, window: tuple[int, int], server_name: str | None) -> None:
        self.address = address
        self.client = client
        self.max_frame_bytes = max_frame_bytes
        self.closed = False
        self.streams: set[HttpStream] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.extensions = {"sni_hostname": server_name} if server_name else {}
        self._window = window

    async def greet(self, timeout: float) -> None:
        """:raises CannotConnect: nobody answers, or somebody who is not a worker of our version."""
        try:
            async with asyncio.timeout(timeout):
                response = await self.client.get("/", extensions=self.extensions)
        except TimeoutError:
            raise CannotConnect(f"{self.address}: no answer within {timeout:g} s") from None
        except httpx.HTTPError as e:
            raise CannotConnect(f"{self.address}: {_spoken(e)}") from e
        if response.status_code != 200 or response.text != GREETING:
            raise CannotConnect(f"{self.address}: it answers {response.status_code} {response.text[:60]!r} instead of {GREETING!r}; "
                                f"run the same dynamo-core on both sides, and look for a proxy between them")

    def open(self, endpoint: str, payload: bytes, context: Context) -> HttpStream:
        stream = HttpStream(self, *self._window)
        if self.closed:
            stream.finish(Disconnected(f"the connection to {self.address} is closed"))
            return stream
        stream.follow(context)
        if not context.cancelled:
            stream.start(endpoint, payload, context)
        return stream

    async def close(self) -> None:
        self.closed = True
        for stream in list(self.streams):
            stream.finish(Disconnected(f"the connection to {self.address} was closed here"))
            stream.cancelled()
        if self.tasks:
            await asyncio.wait(self.tasks)
        await self.client.aclose()


class HttpStream(BoundedMailbox):
    __slots__ = ("_channel", "_task")

    def __init__(self, channel: HttpChannel, window_items: int, window_bytes: int) -> None:
        super().__init__(window_items, window_bytes)
        self._channel = channel
        self._task: asyncio.Task[None] | None = None

    def start(self, endpoint: str, payload: bytes, context: Context) -> None:
        channel = self._channel
        self._task = asyncio.get_running_loop().create_task(self._run(endpoint, payload, context), name=f"stream {context.id}")
        channel.streams.add(self)
        channel.tasks.add(self._task)
        self._task.add_done_callback(channel.tasks.discard)

    def cancelled(self) -> None:
        self._channel.streams.discard(self)
        if self._task is not None:
            self._task.cancel()

    async def _run(self, endpoint: str, payload: bytes, context: Context) -> None:
        channel = self._channel
        try:
            error = await self._receive(endpoint, payload, context)
        except asyncio.CancelledError:
            error = Disconnected(f"the call to {channel.address} was cut off")  # of no effect where the caller cancelled: the first end counts
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            channel.closed = True
            error = CannotConnect(f"{channel.address}: {_spoken(e)}")
        except httpx.HTTPError as e:
            error = Disconnected(f"the connection to {channel.address} was lost: {_spoken(e)}")
        except (ProtocolViolation, msgspec.DecodeError) as e:
            error = ProtocolViolation(f"{channel.address}: {e}")
        except Exception as e:
            error = ProtocolViolation(f"the call to {channel.address} cannot be made: {type(e).__name__}: {e}")
        channel.streams.discard(self)
        self.finish(error)
        if channel.closed and not channel.streams:  # nobody was there: whoever asks again gets a new channel, and this one's pool is done
            await channel.client.aclose()

    async def _receive(self, endpoint: str, payload: bytes, context: Context) -> DynamoError | None:
        """Read the response to its end, at the pace of the reader."""
        channel = self._channel
        splitter = Splitter(channel.max_frame_bytes)
        request = channel.client.build_request("POST", "/" + quote(endpoint, safe=""), content=payload,
                                               headers=headers_of(context), extensions=channel.extensions)
        response = await channel.client.send(request, stream=True)
        try:
            if response.status_code != 200:
                text = (await response.aread())[:200].decode("utf-8", "replace")
                return from_wire(response.headers.get("dynamo-error", ProtocolViolation.code), f"{channel.address} answered {response.status_code}: {text}")
            async for chunk in response.aiter_raw():
                for body in splitter.feed(chunk):
                    frame = frames.to_client.decode(body)
                    if type(frame) is Outputs:
                        for output in frame.outputs:
                            self.put(output)
                    elif type(frame) is Data:
                        self.put(frame.item)
                    elif type(frame) is End:
                        return None
                    elif type(frame) is Failure:
                        return from_wire(frame.code, frame.message)
                    elif type(frame) is not Ping:
                        raise ProtocolViolation(f"it sent a {type(frame).__name__.lower()} frame")
                    if self.full:
                        await self.wait_for_room()
            return Disconnected(f"the connection to {channel.address} was lost: the response broke off")
        finally:
            await response.aclose()


def headers_of(context: Context) -> Sequence[tuple[str, str]]:
    """The context as HTTP headers, percent-encoded where the text is the caller's."""
    remaining = context.remaining()
    fields = {
        "dynamo-request-id": quote(context.id), "dynamo-remaining": None if remaining is None else repr(remaining), "dynamo-priority": str(context.priority),
        "dynamo-session": None if context.session is None else quote(context.session),
        "dynamo-tenant": None if context.tenant is None else quote(context.tenant),
        "traceparent": None if context.traceparent is None else quote(context.traceparent),
    }
    return [(name, value) for name, value in fields.items() if value is not None]


def _spoken(error: Exception) -> str:
    return str(error) or type(error).__name__
