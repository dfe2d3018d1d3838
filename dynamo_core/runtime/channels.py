"""Connections to other processes: one per address, made on demand, dropped when they break."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dynamo_core.context import Context
from dynamo_core.errors import Cancelled
from dynamo_core.transport.contract import Channel, Item, RequestPlane, Stream


class Channels:
    """Hands out channels. Nothing here closes a channel that works: a worker that leaves discovery still finishes its streams."""

    def __init__(self, plane: RequestPlane) -> None:
        self._plane = plane
        self._open: dict[str, Channel] = {}
        self._connecting: dict[str, asyncio.Task[Channel]] = {}

    def ready(self, address: str) -> Channel | None:
        """The channel to `address` if it is connected: the hot path has nothing to await."""
        channel = self._open.get(address)
        return None if channel is None or channel.closed else channel

    async def get(self, address: str) -> Channel:
        """:raises CannotConnect: nobody answers there."""
        if (channel := self.ready(address)) is not None:
            return channel
        task = self._connecting.get(address)
        if task is None:
            task = self._connecting[address] = asyncio.create_task(self._connect(address), name=f"connect {address}")
        return await asyncio.shield(task)

    async def _connect(self, address: str) -> Channel:
        for other in [other for other, channel in self._open.items() if channel.closed]:
            del self._open[other]  # workers come and go, each at an address of its own
        try:
            channel = self._open[address] = await self._plane.connect(address)
            return channel
        finally:
            del self._connecting[address]

    async def open(self, address: str, endpoint: str, payload: bytes, context: Context) -> Stream:
        """:raises CannotConnect: nobody answers there."""
        channel = self.ready(address) or await self.get(address)
        return channel.open(endpoint, payload, context)

    async def call(self, address: str, endpoint: str, payload: bytes, context: Context, *, timeout: float) -> list[Item]:
        """All items of a short stream. :raises DynamoError: typed. :raises TimeoutError: not within `timeout` seconds."""
        async with asyncio.timeout(timeout):
            stream = await self.open(address, endpoint, payload, context)
            items: list[Item] = []
            try:
                while batch := await stream.read():
                    items += batch
            except (asyncio.CancelledError, Cancelled):
                stream.cancel()
                raise
            return items

    def forget(self, address: str) -> None:
        """Nobody is registered there any more; the channel is kept until it breaks or the process ends."""
        if (channel := self._open.get(address)) is not None and channel.closed:
            del self._open[address]

    async def close(self) -> None:
        for task in self._connecting.values():
            task.cancel()
        channels: Sequence[Channel] = list(self._open.values())
        self._open.clear()
        await asyncio.gather(*(channel.close() for channel in channels), return_exceptions=True)


