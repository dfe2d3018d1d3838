"""KV cache events from vLLM's ZMQ publisher, one feed for each data-parallel rank, complete and in order.

vLLM numbers its batches and keeps the last ones for replay. A feed asks for a replay when it starts and whenever a number is
missing; what even the replay no longer has is answered by forgetting: it reports the whole cache as cleared, so that nobody
counts on blocks that may be gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from dynamo_core.ending import ended
from dynamo_core.engines import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from dynamo_vllm.images import MEDIA

log = logging.getLogger(__name__)

REPLAY_TIMEOUT = 5.0
_QUIET = 1000
"""Milliseconds without news after which the last news are made sure of."""
_TIERS = {"GPU": "device", "CPU": "host", "STORAGE": "disk", None: "device"}
"""vLLM calls its main memory `GPU`, on CPU too."""
_FULL = ("full_attention", "mla_attention", None)
"""Kinds of cache whose blocks say that a prefix is there. Others (sliding windows, state) keep only a part of it."""

_decode = msgspec.msgpack.Decoder(tuple[float, list[dict[str, Any]], int | None]).decode


class Translator:
    """vLLM's events into ours. Remembers which blocks hang below a salted one: only the first block of a prompt names its salt."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._salts: dict[int | bytes, str] = {}
        self._ignored_groups: set[int] = set()

    def translate(self, raw: Sequence[dict[str, Any]]) -> list[KvEvent]:
        events: list[KvEvent] = []
        for event in raw:
            match event.get("type"):
                case "BlockStored":
                    if self._counts(event):
                        events.append(self._stored(event))
                case "BlockRemoved":
                    if event.get("group_idx") not in self._ignored_groups:
                        for block in event["block_hashes"] if self._salts else ():
                            self._salts.pop(block, None)
                        events.append(BlocksRemoved(event["block_hashes"], _tier(event)))
                case "AllBlocksCleared":
                    self._salts.clear()
                    events.append(BlocksCleared())
                case _:
                    pass
        return events

    def _counts(self, event: dict[str, Any]) -> bool:
        if event.get("kv_cache_spec_kind") in _FULL and event["block_size"] == self._block_size:
            return True
        self._ignored_groups.add(event.get("group_idx") or 0)
        return False

    def _stored(self, event: dict[str, Any]) -> BlocksStored:
        hashes, parent, adapter = event["block_hashes"], event["parent_block_hash"], event.get("lora_name")
        salt = self._salts.get(parent) if parent is not None else _salt(event, adapter)
        if salt is not None:
            self._salts |= dict.fromkeys(hashes, salt)
        return BlocksStored(hashes, parent, event["token_ids"], _tier(event), adapter, salt, _media(event))


def _tier(event: dict[str, Any]) -> str:
    return _TIERS.get(event.get("medium"), "external")


def _salt(event: dict[str, Any], adapter: str | None) -> str | None:
    keys = (event.get("extra_keys") or [None])[0] or ()
    texts = [key for key in keys[1 if adapter is not None else 0 :] if isinstance(key, str) and not key.startswith(MEDIA)]
    return texts[0] if texts else None


def _media(event: dict[str, Any]) -> list[list[int | str | bytes]]:
    """For each block, the images that reach into it; nothing when there are none."""
    found: list[list[int | str | bytes]] = []
    for keys in event.get("extra_keys") or ():
        names = [key[0] if isinstance(key, list | tuple) and key else key for key in keys or ()]
        found.append([name.removeprefix(MEDIA) for name in names if isinstance(name, str) and name.startswith(MEDIA)])
    return found if any(found) else []


class KvFeed:
    """Follows one rank from `open` to `close`."""

    def __init__(self, rank: int, endpoints: tuple[str, str], publish: Callable[[Sequence[KvEvent], int], None]) -> None:
        self.rank = rank
        self._publish = publish
        self._replay_endpoint = endpoints[1]
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(0)
        self._socket.subscribe(b"")
        self._socket.connect(endpoints[0])
        self._next = 0
        self._translator: Translator | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self, block_size: int) -> None:
        """Begin to publish, with what the engine has said since it started."""
        self._translator = Translator(block_size)
        await self._catch_up()
        self._task = asyncio.create_task(self._run(), name=f"kv events of rank {self.rank}")

    async def close(self) -> None:
        await ended(self._task)
        self._context.destroy(linger=0)

    async def _run(self) -> None:
        sure = False
        while True:
            if not sure and not await self._socket.poll(_QUIET):
                await self._catch_up()  # no later number tells that the last one of a burst was lost
                sure = True
            _, number, payload = await self._socket.recv_multipart()
            sure = False
            sequence = int.from_bytes(number, "big")
            if sequence < self._next:
                continue  # a replay had it already
            if sequence > self._next:
                await self._catch_up()
            if sequence >= self._next:
                self._take(sequence, payload)

    def _take(self, sequence: int, payload: bytes) -> None:
        assert self._translator is not None
        if sequence > self._next:
            log.warning("KV events %d to %d of rank %d are lost; its cache counts as empty", self._next, sequence - 1, self.rank)
            self._publish([BlocksCleared()], self.rank)
        self._next = sequence + 1
        try:
            events = self._translator.translate(_decode(payload)[1])
        except (msgspec.MsgspecError, KeyError, TypeError) as e:
            log.warning("KV events %d of rank %d are not understood, its cache counts as empty: %s", sequence, self.rank, e)
            events = [BlocksCleared()]
        if events:
            self._publish(events, self.rank)

    async def _catch_up(self) -> None:
        """Take everything from `_next` on that the engine still has."""
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay_endpoint)
            await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
            async with asyncio.timeout(REPLAY_TIMEOUT):
                while True:
                    *_, number, payload = await socket.recv_multipart()
                    sequence = int.from_bytes(number, "big", signed=True)
                    if sequence < 0:
                        return
                    if sequence >= self._next:
                        self._take(sequence, payload)
        except TimeoutError:
            log.warning("the engine did not replay KV events of rank %d within %g s", self.rank, REPLAY_TIMEOUT)
        finally:
            socket.close(linger=0)
