"""Who is there: instances joined with their model cards, as discovery says.

Records arrive one by one and in any order; what comes out is whole workers. While the store is away nothing changes:
the last known good state stays in use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.discovery.contract import Delete, Put, Resync, Synced
from dynamo_core.errors import StoreUnavailable
from dynamo_core.runtime import names
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance

log = logging.getLogger(__name__)


class FleetWatch:
    """Calls `joined(instance, card)` and `left(instance)` for each worker of a namespace, each once and in turn."""

    def __init__(self, runtime: Runtime, joined: Callable[[Instance, ModelCard], None], left: Callable[[Instance], None], *,
                 namespace: str | None = None) -> None:
        self._runtime = runtime
        self._namespace = namespace or runtime.config.namespace
        self._joined = joined
        self._left = left
        self._instances: dict[str, Instance] = {}
        self._cards: dict[str, ModelCard] = {}
        self._present: dict[str, tuple[Instance, ModelCard]] = {}
        self._bad: dict[str, str] = {}
        self.synced = asyncio.Event()
        """The present has been seen once."""

    def problems(self) -> dict[str, str]:
        """Records that cannot be read, by key."""
        return dict(self._bad)

    async def run(self) -> None:
        """Watch until cancelled."""
        seen = [asyncio.Event(), asyncio.Event()]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(names.instances(self._namespace), self._instances, Instance, seen[0]), name="watch instances")
            group.create_task(self._follow(names.models(self._namespace), self._cards, ModelCard, seen[1]), name="watch models")
            for event in seen:
                await event.wait()
            self.synced.set()

    async def _follow(self, prefix: str, records: dict[str, Any], kind: type[Any], seen: asyncio.Event) -> None:
        decoder = msgspec.json.Decoder(kind)
        while True:
            try:
                async with self._runtime.discovery.watch(prefix) as changes:
                    fresh: dict[str, Any] | None = {}
                    async for change in changes:
                        match change:
                            case Resync():
                                fresh = {}
                            case Put(key, value):
                                self._read(decoder, key, value, records if fresh is None else fresh)
                                if fresh is None:
                                    self._reconcile(names.tail(key))
                            case Delete(key):
                                self._bad.pop(key, None)
                                (records if fresh is None else fresh).pop(names.tail(key), None)
                                if fresh is None:
                                    self._reconcile(names.tail(key))
                            case Synced():
                                tails = {*records, *(fresh or {})}
                                if fresh is not None:
                                    records.clear()
                                    records.update(fresh)
                                    fresh = None
                                for tail in sorted(tails):
                                    self._reconcile(tail)
                                seen.set()
            except StoreUnavailable as e:
                log.warning("discovery is away, going on with what is known: %s", e)
            await asyncio.sleep(0.5)

    def _read(self, decoder: msgspec.json.Decoder[Any], key: str, value: bytes, into: dict[str, Any]) -> None:
        try:
            into[names.tail(key)] = decoder.decode(value)
            self._bad.pop(key, None)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            if key not in self._bad:
                log.warning("record %s is not understood and left out: %s", key, e)
            self._bad[key] = str(e)
            into.pop(names.tail(key), None)

    def _reconcile(self, tail: str) -> None:
        instance, card = self._instances.get(tail), self._cards.get(tail)
        wanted = (instance, card) if instance is not None and card is not None else None
        present = self._present.get(tail)
        if wanted == present:
            return
        if present is not None:
            del self._present[tail]
            self._left(present[0])
        if wanted is not None:
            self._present[tail] = wanted
            self._joined(*wanted)
