"""The reading end of a stream inside one process: a list that the reader takes whole, and one future that wakes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dynamo_core.context import Context
from dynamo_core.errors import Cancelled, DynamoError
from dynamo_core.transport.contract import Item, Listening, Sink


class Mailbox(Listening):
    """A `Stream` whose items are put here one by one. One reader at a time."""

    __slots__ = ("_error", "_finished", "_forget", "_items", "_loop", "_sink", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False
        self._error: DynamoError | None = None
        self._forget: Callable[[], None] | None = None
        self._sink: Sink | None = None

    def follow(self, context: Context) -> None:
        """Cancel this stream when the request is cancelled."""
        forget = context.on_cancel(self.cancel)
        if self._finished:
            forget()
        else:
            self._forget = forget

    def put(self, item: Item) -> None:
        if self._finished:
            return
        self._items.append(item)
        if self._waiter is not None:
            self.wake()

    def add(self, item: Item) -> bool:
        """Put an item without waking the reader; whether one waits, and `wake` is due."""
        if not self._finished:
            self._items.append(item)
        return self._waiter is not None

    def finish(self, error: DynamoError | None = None) -> None:
        """No more items. What has arrived stays readable; the first end counts."""
        if self._finished:
            return
        self._finished = True
        self._error = error
        self._sink = None  # which knows this stream: together they would be garbage that only the collector finds
        if self._forget is not None:
            self._forget()
            self._forget = None
        if self._waiter is not None:
            self.wake()

    async def read(self) -> Sequence[Item]:
        while not self._items:
            if self._finished:
                if self._error is not None:
                    raise self._error.with_traceback(None)
                return ()
            self._waiter = self._loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        self.taken(items)
        return items

    def listen(self, sink: Sink) -> None:
        self._sink = sink

    def cancel(self) -> None:
        if not self._finished:
            self.finish(Cancelled("the caller cancelled the stream"))
            self.cancelled()

    def taken(self, items: list[Item]) -> None:
        """The reader has taken these: as many again may be sent."""

    def cancelled(self) -> None:
        """The reader wants no more: tell the other side."""

    def wake(self) -> None:
        """Have the reader, if one waits, take what is there, or the sink in its place. Ends are the reader's."""
        waiter = self._waiter
        if waiter is None:
            return
        if waiter.done():  # the reading task was cancelled
            self._waiter = None
            return
        items, sink = self._items, self._sink
        try:
            if sink is not None and items and not self._finished and sink(items):
                self._items = []
                self.taken(items)
                return
        except Exception as e:  # whoever fills this mailbox has no part in it: it is the reader's
            self._waiter = None
            waiter.set_exception(e)
            return
        self._waiter = None
        waiter.set_result(None)


class BoundedMailbox(Mailbox):
    """A mailbox whose filler waits for the reader: past the window of unread items or bytes nothing more is asked for."""

    __slots__ = ("_bytes", "_room", "_window_bytes", "_window_items")

    def __init__(self, window_items: int, window_bytes: int) -> None:
        super().__init__()
        self._window_items = window_items
        self._window_bytes = window_bytes
        self._bytes = 0
        """Of unread items that are bytes."""
        self._room: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        if isinstance(item, bytes):
            self._bytes += len(item)
        super().put(item)

    @property
    def full(self) -> bool:
        return len(self._items) >= self._window_items or self._bytes >= self._window_bytes

    async def wait_for_room(self) -> None:
        while self.full:
            self._room = self._loop.create_future()
            await self._room

    def taken(self, items: list[Item]) -> None:
        self._bytes = 0
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)
