"""One kind of object in one namespace, followed for as long as it takes: list, watch with bookmarks, and list again when the thread is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from dynamo_core.ending import ended
from dynamo_kubernetes.api import Kube, Object, Refused, Unreachable

T = TypeVar("T")
log = logging.getLogger(__name__)

_BREATH = 0.2
_LONGEST_BREATH = 3.0
"""Seconds between two attempts, doubled from the first to the second."""


class Reflection(Generic[T]):
    """`objects` is what the server has, by name, as `parse` reads it; `changed(name, before, after)` is told of every difference.

    A list that follows a broken watch passes on only what differs, deletions first, then in the order of resource versions.
    """

    def __init__(self, kube: Kube, path: str, selector: str, parse: Callable[[Object], T | None], changed: Callable[[str, T | None, T | None], None]) -> None:
        self.objects: dict[str, T] = {}
        self.connected_at = float("inf")
        """Since when, on the monotonic clock, nothing was missed. Infinite while the server is away."""
        self._kube = kube
        self._path = path
        self._params = {"labelSelector": selector} if selector else {}
        self._parse = parse
        self._changed = changed
        self._listed = asyncio.Event()
        self._restarting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def fresh(self) -> None:
        """Return when `objects` shows everything that had happened before the call."""
        async with self._restarting:
            await ended(self._task)
            if self._listed.is_set():  # else whoever waits already is content with the list that begins now
                self._listed = asyncio.Event()
            self._task = asyncio.create_task(self._run(), name=f"kubernetes: follow {self._path}")
            listed = self._listed
        await listed.wait()

    async def close(self) -> None:
        async with self._restarting:
            await ended(self._task)
            self._task = None

    async def _run(self) -> None:
        pause = _BREATH
        while True:
            try:
                items, version = await self._kube.listing(self._path, **self._params)
                self._replace(items)
                self.connected_at = min(self.connected_at, time.monotonic())
                self._listed.set()
                pause = _BREATH
                while True:
                    version = await self._follow(version)
            except Unreachable as e:
                log.debug("%s", e)
            except Refused as e:
                # 410 Gone is everyday life: the server keeps a few minutes of history.
                (log.debug if e.code == 410 else log.warning)("following %s was refused: %s", self._path, e)
            except Exception:
                log.exception("following %s broke", self._path)
            self.connected_at = float("inf")
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
            pause = min(2 * pause, _LONGEST_BREATH)

    async def _follow(self, version: str) -> str:
        """Pass on changes until the server ends the watch. Returns the version to go on from."""
        async with self._kube.watch(self._path, version, **self._params) as events:
            async for event in events:
                found = event["object"]
                version = found["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    self._forget(found["metadata"]["name"])
                elif event["type"] != "BOOKMARK":
                    self._take(found)
        return version

    def _replace(self, items: list[Object]) -> None:
        present = {item["metadata"]["name"] for item in items}
        for name in [name for name in self.objects if name not in present]:
            self._forget(name)
        for item in sorted(items, key=_age):
            self._take(item)

    def _take(self, found: Object) -> None:
        name = found["metadata"]["name"]
        try:
            after = self._parse(found)
        except (KeyError, TypeError, ValueError) as e:
            log.warning("%s/%s is not understood and left out: %r", self._path, name, e)
            after = None
        if after is None:
            self._forget(name)
            return
        before = self.objects.get(name)
        self.objects[name] = after
        if before != after:
            self._changed(name, before, after)

    def _forget(self, name: str) -> None:
        if (before := self.objects.pop(name, None)) is not None:
            self._changed(name, before, None)


def _age(item: Object) -> int:
    version = item["metadata"]["resourceVersion"]
    return int(version) if version.isdigit() else 0
