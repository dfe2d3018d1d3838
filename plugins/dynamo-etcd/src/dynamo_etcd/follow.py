"""One watched prefix: the present as one revision of the store, then every change after it, over as many connections as it takes."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

import aiohttp
import attrs
import msgspec

from dynamo_core.discovery.contract import Delete, Put
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.ending import ended
from dynamo_core.errors import StoreUnavailable
from dynamo_etcd.gateway import OUT_OF_RANGE, Gateway, Refused
from dynamo_etcd.wire import Event, Found, KeyValue, WatchLine, prefix_end

log = logging.getLogger(__name__)

_PAGE = 256
"""Records that are read at once."""
_BREATH = 0.2
"""Seconds between two attempts to watch again."""
_LINE = msgspec.json.Decoder(WatchLine, strict=False)
_BROKEN = (OSError, ssl.SSLError, aiohttp.ClientError, TimeoutError, StoreUnavailable, Refused, msgspec.DecodeError)


async def read(gateway: Gateway, prefix: bytes) -> tuple[list[KeyValue], int]:
    """All records with this prefix as they are at one revision, and that revision."""
    found: list[KeyValue] = []
    start, end, revision, page = prefix, prefix_end(prefix), 0, _PAGE
    while True:
        try:
            answer = await gateway.call("kv/range", {"key": start, "range_end": end, "limit": page, "revision": revision}, Found)
        except Refused as e:
            if "larger than max" not in str(e) or page == 1:
                raise
            page = max(1, page // 4)
            continue
        found += answer.kvs
        revision = revision or answer.header.revision
        if not answer.more:
            return found, revision
        start = answer.kvs[-1].key + b"\0"


@attrs.frozen
class _Known:
    put: Put
    revision: int


class Follower:
    """Feeds `watcher`. Whenever the connection breaks it reads the present again and passes on what differs.

    That is right after every kind of trouble: a lost connection, a compacted revision, a member restored from a backup, a store that lost its data. In the
    last case the records that vanished stay in use for `grace` seconds: their owners are alive and register again.
    """

    def __init__(self, gateway: Gateway, root: bytes, prefix: str, backlog: int, grace: float) -> None:
        self._gateway = gateway
        self._root = root
        self._prefix = root + prefix.encode()
        self._grace = grace
        self._known: dict[str, _Known] = {}
        self._held: dict[str, asyncio.TimerHandle] = {}
        self.watcher = Watcher(prefix, lambda: [known.put for known in self._known.values()], backlog)
        self._task = asyncio.create_task(self._run(), name=f"discovery: watch {prefix}")

    async def close(self) -> None:
        for handle in self._held.values():
            handle.cancel()
        self.watcher.close()
        await ended(self._task)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow(await self._catch_up())
            except _BROKEN as e:
                log.debug("the watch of %s broke: %s", self._prefix, e)
            except Exception:
                log.exception("the watch of %s broke", self._prefix)
            await asyncio.sleep(_BREATH)

    # ------------------------------------------------------------------ the present

    async def _catch_up(self) -> int:
        """Pass on how the present differs from what is known. Returns the revision of that present."""
        records, revision = await read(self._gateway, self._prefix)
        lost = bool(self._known) and not await self._same_history()
        if lost:
            log.warning("etcd has lost its data; known records of %s stay in use for %g s", self._prefix.decode(), self._grace)
        present = {self._name(record.key): record for record in records}
        for key in [key for key in self._known if key not in present and key not in self._held]:
            if lost:
                self._held[key] = asyncio.get_running_loop().call_later(self._grace, self._release, key)
            else:
                self._forget(key)
        for record in present.values():
            self._put(record)
        self.watcher.start()
        return revision

    async def _same_history(self) -> bool:
        """Whether this is the store that we knew. It still has its own past, unless that was compacted."""
        key, newest = max(self._known.items(), key=lambda item: item[1].revision)
        try:
            answer = await self._gateway.call("kv/range", {"key": self._root + key.encode(), "revision": newest.revision}, Found)
        except Refused as e:
            if e.code != OUT_OF_RANGE:
                raise
            return "compacted" in str(e)
        return [record.mod_revision for record in answer.kvs] == [newest.revision] and answer.kvs[0].value == newest.put.value

    def _release(self, key: str) -> None:
        if self._held.pop(key, None) is not None:
            self._forget(key)

    # ------------------------------------------------------------------ changes

    async def _follow(self, revision: int) -> None:
        """Pass on every change after `revision`, until the stream breaks or etcd has forgotten that revision."""
        request: dict[str, Any] = {"key": self._prefix, "range_end": prefix_end(self._prefix), "start_revision": revision + 1, "fragment": True}
        async with self._gateway.lines("watch", {"create_request": request}) as lines:
            async for line in lines:
                parsed = _LINE.decode(line)
                if parsed.error is not None:
                    raise StoreUnavailable(f"etcd ended the watch: {parsed.error.message}")
                if parsed.result is None or parsed.result.canceled:
                    log.debug("etcd canceled the watch of %s: %s", self._prefix, parsed.result)
                    return
                for event in parsed.result.events:
                    self._change(event)

    def _change(self, event: Event) -> None:
        if event.type == "DELETE":
            key = self._name(event.kv.key)
            if key not in self._held:
                self._forget(key)
        else:
            self._put(event.kv)

    def _put(self, record: KeyValue) -> None:
        key = self._name(record.key)
        put = Put(key, record.value, record.lease or None)
        if (held := self._held.pop(key, None)) is not None:
            held.cancel()
        before = self._known.get(key)
        self._known[key] = _Known(put, record.mod_revision)
        if before is None or before.revision != record.mod_revision:
            self.watcher.push(put)

    def _forget(self, key: str) -> None:
        if self._known.pop(key, None) is not None:
            self.watcher.push(Delete(key))

    def _name(self, key: bytes) -> str:
        return key[len(self._root) :].decode("ascii", "replace")


