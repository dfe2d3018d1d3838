"""A network that misbehaves on command: a TCP proxy in front of any server, that delays, cuts or swallows what passes."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from urllib.parse import urlsplit, urlunsplit


class Proxy:
    """`async with Proxy("127.0.0.1", 4222) as proxy:` and let the client connect to `proxy.port`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self.port = 0
        self.delay = 0.0
        """Seconds that everything takes on its way, in each direction."""
        self.refusing = False
        """New connections are closed at once."""
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: asyncio.Server

    @classmethod
    def before(cls, url: str) -> Proxy:
        """In front of the server with this URL; `url_of` says how to reach it through the proxy."""
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port)

    def url_of(self, url: str) -> str:
        return urlunsplit(urlsplit(url)._replace(netloc=f"127.0.0.1:{self.port}"))

    async def __aenter__(self) -> Proxy:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._listener.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        for writer in self._writers:
            writer.transport.abort()

    def blackhole(self) -> None:
        """Keep every connection open and let nothing pass, of new connections neither."""
        self._open.clear()

    def heal(self) -> None:
        """Let everything pass again, what was held back included."""
        self._open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.transport.abort()
            return
        await self._open.wait()
        try:
            there_reader, there = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        for source, sink in ((reader, there), (there_reader, writer)):
            self._writers.add(sink)
            task = asyncio.create_task(self._pass(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await self._open.wait()
                sink.write(chunk)
                await sink.drain()
        sink.close()
        self._writers.discard(sink)
