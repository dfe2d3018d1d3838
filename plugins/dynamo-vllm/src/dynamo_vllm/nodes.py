"""One vLLM on several nodes, which is worth nothing without any of them: the node with the head and the others hold connections, and see each other go.

vLLM itself does not see it: engine cores wait for ever for a head that has left, and a head for an engine core on a machine that is gone. The head
listens one port above the one where vLLM's own nodes meet. Like vLLM's ports, it is for the nodes of this engine and for nobody else.

    other node -> head    a Hello; later `leaving`, when it was told to end
    head -> other node    `welcome`, `later` (ask again) or `refused REASON`; then `ready`, once the engine is up
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import attrs
import msgspec

from dynamo_core.ending import ended
from dynamo_core.errors import ConfigError, EngineFailed, Problem

log = logging.getLogger(__name__)

_AGAIN = 1.0
"""Seconds between two attempts to find the head."""
_PATIENCE = 10.0
"""Seconds in which a peer that has connected must say what is due."""
_SILENCE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
"""A machine that vanishes without a word counts as gone after 11 seconds."""


@attrs.frozen
class Place:
    """Where a node stands among those of its engine."""

    host: str
    port: int
    """Where the head listens for the other nodes."""
    ranks: tuple[int, ...]
    """Data-parallel ranks whose engine cores run on this node; none where it only lends GPUs to a rank of another node."""
    size: int
    """Data-parallel ranks of all nodes."""
    node: int
    """Number of the node, where nodes have numbers."""


class Hello(msgspec.Struct, frozen=True):
    host: str
    vllm: str
    ranks: tuple[int, ...]
    node: int

    def __str__(self) -> str:
        return f"node {self.host} ({'rank ' + ', '.join(map(str, self.ranks)) if self.ranks else f'node_rank {self.node}'})"


class OtherNodes:
    """The other nodes, as the one with the head sees them. `lost` and `leaving` are told what to say of a node."""

    def __init__(self, place: Place, vllm: str, lost: Callable[[str], None], leaving: Callable[[str], None]) -> None:
        self._place = place
        self._vllm = vllm
        self._lost = lost
        self._leaving = leaving
        self._nodes: dict[asyncio.StreamWriter, Hello] = {}
        self._complete = False
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """:raises ConfigError: the address cannot be listened on."""
        place = self._place
        try:
            self._server = await asyncio.start_server(self._connected, place.host, place.port)
        except OSError as e:
            raise ConfigError(Problem(f"cannot listen on {place.host}:{place.port} for the other nodes of this engine: {e.strerror or e}",
                                      remedy="data_parallel_address (or master_addr) must be an address of this node, and the port must be free")) from e

    def ready(self) -> None:
        """The engine is up, with everybody who is there; who comes later belongs to another one."""
        self._complete = True
        for writer in self._nodes:
            writer.write(b"ready\n")

    async def close(self) -> None:
        """Tell the other nodes that the head leaves, by hanging up."""
        self._complete = True
        if self._server is not None:
            self._server.close()
        await ended(*self._handlers)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            _notice_silence(writer)
            await self._follow(reader, writer)
        except (OSError, TimeoutError, ValueError) as e:  # ValueError: it is no hello, or a line without end
            log.warning("somebody who is no node of this engine has connected: %s", e)
        finally:
            self._handlers.discard(task)
            writer.close()

    async def _follow(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_PATIENCE):
            hello = msgspec.json.decode(await reader.readline(), type=Hello)
        writer.write(answer := self._answer(hello))
        if answer != b"welcome\n":
            await writer.drain()
            return
        log.info("%s has joined", hello)
        self._nodes[writer] = hello
        try:
            while line := await reader.readline():
                if line == b"leaving\n":
                    self._leaving(f"{hello} is leaving")
        except OSError:
            pass
        finally:
            del self._nodes[writer]
        self._lost(f"{hello} of this engine is gone")

    def _answer(self, hello: Hello) -> bytes:
        place = self._place
        if hello.vllm != self._vllm:
            return f"refused the head runs vLLM {self._vllm} and this node {hello.vllm}\n".encode()
        if any(rank not in range(place.size) for rank in hello.ranks) or set(hello.ranks) & set(place.ranks):
            return f"refused the engine has {place.size} ranks, of which the head runs {list(place.ranks)} itself, and this node {list(hello.ranks)}\n".encode()
        taken = any(set(hello.ranks) & set(other.ranks) or (hello.node and hello.node == other.node) for other in self._nodes.values())
        return b"later\n" if taken or self._complete else b"welcome\n"


class Head:
    """The node with the head, as another node sees it."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer

    @classmethod
    async def find(cls, place: Place, vllm: str) -> Head:
        """Wait until it is there and takes us. :raises ConfigError: it will not."""
        hello = msgspec.json.encode(Hello(socket.gethostname(), vllm, place.ranks, place.node)) + b"\n"
        told = False
        while True:
            answer = b""
            try:
                reader, writer = await asyncio.open_connection(place.host, place.port)
            except OSError:
                pass
            else:
                try:
                    _notice_silence(writer)
                    if writer.get_extra_info("sockname") == writer.get_extra_info("peername"):
                        raise ConnectionError("TCP connects a port that nobody listens on to itself, when it happens to be chosen for the other end")
                    writer.write(hello)
                    async with asyncio.timeout(_PATIENCE):
                        answer = await reader.readline()
                    if answer == b"welcome\n":
                        return cls(f"the head at {place.host}:{place.port}", reader, writer)
                except (OSError, TimeoutError, ValueError):
                    pass
                except BaseException:
                    writer.close()
                    raise
                writer.close()
            if answer.startswith(b"refused "):
                raise ConfigError(Problem(f"the head at {place.host}:{place.port} refuses this node: {answer[8:].decode(errors='replace').strip()}"))
            if answer == b"later\n" and not told:
                told = True
                log.info("the head at %s:%d runs an engine without this node; waiting for its next one", place.host, place.port)
            await asyncio.sleep(_AGAIN)

    async def ready(self) -> None:
        """Wait until the whole engine is up. :raises EngineFailed: the head is gone."""
        try:
            if await self._reader.readline() == b"ready\n":
                return
        except (OSError, ValueError):
            pass
        raise EngineFailed(f"{self.name} is gone")

    async def gone(self) -> None:
        """Wait until it has left."""
        try:
            while await self._reader.read(1024):
                pass
        except OSError:
            pass

    def leave(self) -> None:
        """Ask it to take no more requests, because this node was told to end."""
        self._writer.write(b"leaving\n")

    def close(self) -> None:
        self._writer.close()


def _notice_silence(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SILENCE:
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
