"""Who publishes a topic, as discovery says, and whom of them we have heard: the same for every plane whose publishers register."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import attrs

from dynamo_core.discovery.contract import Delete, Discovery, Put, Resync, Synced
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError

_GREETINGS = 1.0
"""Seconds for which a new subscriber waits for those publishers that are there already."""
_SILENT = 5.0
"""Seconds without a word after which a publisher counts as unreachable."""

log = logging.getLogger(__name__)


def advert_prefix(topic: str) -> str:
    """What the records of a topic's publishers begin with; their lease follows, in hexadecimal."""
    return f"v1/events/{topic}/"


class Joined(Protocol):
    """Somebody publishes, or advertises anew. Returns whether that is usable."""

    def __call__(self, publisher: int, key: str, value: bytes, /) -> bool: ...


@attrs.define
class _Peer:
    since: float
    greeted: bool = False


class Publishers:
    """The publishers of one topic. `joined` is called before somebody counts, and `left` after he no longer does."""

    def __init__(self, discovery: Discovery, topic: str, joined: Joined, left: Callable[[int], None]) -> None:
        self._discovery = discovery
        self._topic = topic
        self._joined = joined
        self._left = left
        self._peers: dict[int, _Peer] = {}
        self._synced = False
        self._ready = asyncio.Event()
        self._trouble: str | None = None
        self._loop = asyncio.get_running_loop()
        self._following = asyncio.create_task(self._follow(), name=f"events: publishers of {topic}")

    def __contains__(self, publisher: int) -> bool:
        return publisher in self._peers

    async def heard(self) -> None:
        """Wait until those who are there already have greeted us, or for a second; `silent` names whom we miss."""
        try:
            async with asyncio.timeout(_GREETINGS):  # wait_for may swallow a cancellation
                await self._ready.wait()
        except TimeoutError:
            pass

    def greeted(self, publisher: int) -> None:
        """We have heard of somebody who is there."""
        peer = self._peers[publisher]
        if not peer.greeted:
            peer.greeted = True
            self._check_ready()

    @property
    def all_greeted(self) -> bool:
        return all(peer.greeted for peer in self._peers.values())

    def trouble(self) -> str | None:
        """Why publishers are not found any more."""
        return self._trouble

    def silent(self) -> tuple[list[int], int]:
        """Who has not greeted us for too long, and of how many."""
        now = self._loop.time()
        return [publisher for publisher, peer in self._peers.items() if not peer.greeted and now - peer.since > _SILENT], len(self._peers)

    async def close(self) -> None:
        await ended(self._following)

    async def _follow(self) -> None:
        unseen: set[int] = set()
        prefix = advert_prefix(self._topic)
        try:
            async with self._discovery.watch(prefix) as changes:
                async for change in changes:
                    match change:
                        case Put(key, value):
                            if (publisher := _publisher(key, prefix)) is not None:
                                unseen.discard(publisher)
                                self._add(publisher, key, value)
                        case Delete(key):
                            if (publisher := _publisher(key, prefix)) is not None:
                                self._remove(publisher)
                        case Resync():
                            unseen = set(self._peers)
                        case Synced():
                            for publisher in unseen:
                                self._remove(publisher)
                            unseen = set()
                            self._synced = True
                            self._check_ready()
        except DynamoError as e:
            self._trouble = f"no longer finds publishers of {self._topic}: {e}"
            log.warning("lost sight of publishers", extra={"topic": self._topic, "because": str(e)})

    def _add(self, publisher: int, key: str, value: bytes) -> None:
        new = publisher not in self._peers
        if new:
            self._peers[publisher] = _Peer(self._loop.time())
        if not self._joined(publisher, key, value) and new:
            del self._peers[publisher]

    def _remove(self, publisher: int) -> None:
        if self._peers.pop(publisher, None) is not None:
            self._left(publisher)
            self._check_ready()

    def _check_ready(self) -> None:
        if self._synced and self.all_greeted:
            self._ready.set()


def _publisher(key: str, prefix: str) -> int | None:
    """Whose advertisement this is; `None` for one of another topic that begins alike."""
    try:
        return int(key.removeprefix(prefix), 16)
    except ValueError:
        return None
