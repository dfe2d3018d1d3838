"""What every request plane must do: open streams to named endpoints, multiplexed and cancellable.

    T1  Every item arrives once and in order; a stream ends with an end or with a typed error, never silently.
    T2  Cancelling a stream closes the handler's iterator on the other side within one step.
    T3  A broken connection ends each of its streams with `Disconnected`; nobody else is disturbed.
    T4  An unknown endpoint is `EndpointNotFound`; an error raised by the handler arrives as its class (see `errors.to_wire`).
    T5  A peer that breaks the protocol or a limit is dropped, with a reason in the log, and hurts nobody else.
    T6  A slow reader bounds memory on both sides: past the window the handler is not asked for more.
    T7  Outputs that become ready in one loop turn travel together (planes that can batch, do).
    T8  The context travels: id, remaining deadline, priority, session, tenant, trace context.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, runtime_checkable

from dynamo_core.context import Context
from dynamo_core.types import Output

Item = Output | bytes
"""Token streams carry `Output`; every other endpoint carries bytes of its own format."""


@runtime_checkable
class Handler(Protocol):
    """The serving side of every endpoint of a process: the runtime is the only implementation outside of tests.

    Closing the returned iterator (`aclose`) means that nobody wants the rest.
    """

    def __call__(self, endpoint: str, payload: bytes, context: Context) -> AsyncIterator[Item]: ...


@runtime_checkable
class Server(Protocol):
    @property
    def address(self) -> str:
        """What peers connect to, as a URL whose scheme names the plane."""
        ...

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        ...


@runtime_checkable
class Stream(Protocol):
    """The calling side of one stream."""

    async def read(self) -> Sequence[Item]:
        """Everything that has arrived, at least one item; an empty sequence is the end.

        Draining a whole mailbox at once is what merges several tokens into one write when the reader is behind.

        :raises DynamoError: the stream ended badly; the class says how (see `errors.StreamError`).
        """
        ...

    def cancel(self) -> None:
        """Tell the other side to stop. What has arrived stays readable; further items are dropped. Idempotent."""
        ...


Sink = Callable[[Sequence[Item]], bool]
"""Takes items, at least one, in the callback that brought them; `False` leaves all of them to the reader."""


class Listening(abc.ABC):
    """A stream that can spare its reader a wake-up. Optional: without it, everything is read."""

    __slots__ = ()

    @abc.abstractmethod
    def listen(self, sink: Sink) -> None:
        """While the reader waits in `read`, offer what arrives to `sink` first. Ends, errors and what it declines reach the reader, in order."""
        ...


@runtime_checkable
class Channel(Protocol):
    """A connection to one process."""

    @property
    def closed(self) -> bool: ...

    def open(self, endpoint: str, payload: bytes, context: Context) -> Stream:
        """Start a stream. Never raises: whatever goes wrong is raised by `read`."""
        ...

    async def close(self) -> None: ...


@runtime_checkable
class RequestPlane(Protocol):
    scheme: str
    """Of the addresses that it serves: `tcp`, `http`, `inproc`."""

    async def serve(self, handler: Handler, host: str) -> Server:
        """Listen on `host` (an address that peers can reach), port chosen by the plane's own options."""
        ...

    async def connect(self, address: str) -> Channel:
        """:raises CannotConnect: nobody answers, or not within the connect timeout."""
        ...
