"""Where simulated prefill and decode workers meet when both got their request at once: by a number, over TCP, whoever comes first.

    decode  -> "ROOM\\n"          prefill -> "ready\\n"     once the blocks are computed, or the connection ends
    decode  -> "taken\\n"         after the time that the transfer takes; prefill frees the blocks
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import attrs

from dynamo_core.errors import PeerLost

PATIENCE = 60.0
"""Seconds that one side waits for the other."""


def _future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@attrs.define(eq=False)
class Room:
    """One hand-over. `ready`: the blocks are computed. `taken`: they are somewhere else now."""

    ready: asyncio.Future[None] = attrs.field(factory=_future)
    taken: asyncio.Future[None] = attrs.field(factory=_future)


class Desk:
    """The prefill side: a server that decode workers come to."""

    def __init__(self) -> None:
        self._rooms: dict[int, Room] = {}
        self._server: asyncio.Server | None = None
        self._closed = False

    async def open(self, host: str) -> dict[str, str | int]:
        """Listen on a free port. Returns what a decode worker needs to find it."""
        self._server = await asyncio.start_server(self._meet, host, 0, limit=64)
        return {"host": host, "port": self._server.sockets[0].getsockname()[1]}

    async def close(self) -> None:
        self._closed = True
        if self._server is not None:
            self._server.close()
        for number in list(self._rooms):
            self.leave(number)

    def room(self, number: int) -> Room:
        if (room := self._rooms.get(number)) is None:
            room = self._rooms[number] = Room()
        return room

    def leave(self, number: int) -> None:
        """Nobody waits there any more: whoever came is turned away."""
        if (room := self._rooms.pop(number, None)) is not None:
            room.ready.cancel()
            room.taken.cancel()

    async def taken(self, number: int) -> None:
        """The blocks are ready: return when they were taken. :raises PeerLost: the other side has gone, or never came."""
        room = self.room(number)
        if not room.ready.done():
            room.ready.set_result(None)
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait((room.taken,))
        except TimeoutError:
            raise PeerLost(f"no decode worker came for the blocks within {PATIENCE:g} s") from None
        if room.taken.cancelled():
            raise PeerLost("the decode worker left before it had the blocks")

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = -1
        try:
            async with asyncio.timeout(PATIENCE):
                number = int(await reader.readline())
                if self._closed:
                    return
                room = self.room(number)
                await asyncio.wait((room.ready,))
                if room.ready.cancelled():
                    return
                writer.write(b"ready\n")
                if await reader.readline() == b"taken\n" and not room.taken.done():
                    room.taken.set_result(None)
        except (OSError, ValueError, TimeoutError):
            pass  # it did not come to meet anybody, or nobody came
        finally:
            if (room := self._rooms.pop(number, None)) is not None:
                room.taken.cancel()
            writer.close()


@contextlib.asynccontextmanager
async def blocks_of(host: str, port: int, number: int) -> AsyncGenerator[None]:
    """The decode side: entered when prefill has the blocks; left, it has them. :raises PeerLost: prefill is not there."""
    writer = None
    try:
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(host, port, limit=64)
                writer.write(b"%d\n" % number)
                said = await reader.readline()
        except (OSError, ValueError, TimeoutError) as e:
            raise PeerLost(f"the prefill worker at {host}:{port} does not answer: {e or type(e).__name__}") from e
        if said != b"ready\n":
            raise PeerLost(f"the prefill worker at {host}:{port} has no blocks for this request")
        yield
        writer.write(b"taken\n")
    finally:
        if writer is not None:
            writer.close()
