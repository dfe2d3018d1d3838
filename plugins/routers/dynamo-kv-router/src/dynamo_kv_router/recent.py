"""What was sent to a worker is assumed to be in its cache: for a while, and up to what the cache can hold.

This is all that is known of workers that publish no events, and it bridges the moment between a decision and the event that confirms it.
It lives in a level of the index that is its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import repeat

import attrs
import numpy as np

from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.contract import Worker
from dynamo_kv_router.index import SENT, Index

_ROUND = 8
"""Chains that one call forgets, at most, so that no request pays for many others."""
_SPARE = 4096
"""Keys that chains may list beyond twice what counts, before they are shortened."""


@attrs.define(eq=False)
class _Sent:
    """Chains sent to one worker, oldest first: `kept`, then `order`."""

    ttl: float
    room: int
    kept: deque[tuple[float, int, Keys]] = attrs.field(factory=deque[tuple[float, int, Keys]])
    """Shortened to the keys that no later chain has."""
    order: deque[tuple[float, int, Keys]] = attrs.field(factory=deque[tuple[float, int, Keys]])
    listed: int = 0
    """Keys in all of them, the same one several times."""
    last: dict[int, int] = attrs.field(factory=dict[int, int])
    """Key to the number of the latest chain with it."""

    def add(self, now: float, number: int, keys: Keys) -> None:
        """The latest chain. Prompts that are sent again and again must not fill the memory, so that in step with it older ones are shortened."""
        self.last.update(zip(keys.tolist(), repeat(number)))
        self.order.append((now, number, keys))
        self.listed += len(keys)
        budget = 4 * len(keys)
        while budget > 0 and self.listed > 2 * len(self.last) + _SPARE:
            if not self.order:
                self.kept, self.order = self.order, self.kept
            at, number, keys = self.order.popleft()
            budget -= len(keys)
            if mine := self._own(number, keys):
                self.kept.append((at, number, np.array(mine, np.uint64)))
            self.listed -= len(keys) - len(mine)

    def oldest(self) -> float | None:
        """When the oldest chain was sent."""
        chains = self.kept or self.order
        return chains[0][0] if chains else None

    def pop(self) -> list[int]:
        """Give up the oldest chain. Returns its keys that no later one has."""
        _, number, keys = (self.kept or self.order).popleft()
        self.listed -= len(keys)
        mine = self._own(number, keys)
        for name in mine:
            del self.last[name]
        return mine

    def _own(self, number: int, keys: Keys) -> list[int]:
        last = self.last
        return [name for name in keys.tolist() if last.get(name) == number]


class Recent:
    """Least recently sent goes first: a chain gives up only the blocks that no later chain has touched."""

    def __init__(self, index: Index, limit: int) -> None:
        """:param limit: (worker, block) pairs to remember; past it, the worker with most of them forgets its oldest."""
        self.limit = limit
        self._index = index
        self._sent: dict[Worker, _Sent] = {}
        self._number = 0
        self._held = 0
        self._next = math.inf
        """No chain expires before."""

    def __len__(self) -> int:
        """(Worker, block) pairs."""
        return self._held

    def join(self, worker: Worker, ttl: float, room: int) -> None:
        """Follow a worker, or follow it differently from now on. :param ttl: seconds. :param room: blocks that it can hold."""
        if (sent := self._sent.get(worker)) is None:
            self._sent[worker] = _Sent(ttl, max(1, room))
        else:
            sent.ttl, sent.room = ttl, max(1, room)
            self._next = -math.inf

    def drop_worker(self, worker: Worker) -> None:
        """The index forgets the worker by itself."""
        if (sent := self._sent.pop(worker, None)) is not None:
            self._held -= len(sent.last)

    def record(self, worker: Worker, keys: Keys, now: float) -> None:
        """`worker` is being sent a prompt with these blocks."""
        if (sent := self._sent.get(worker)) is None or not len(keys):
            return
        keys = keys[: sent.room]
        self._number += 1
        self._held -= len(sent.last)
        sent.add(now, self._number, keys)
        self._held += len(sent.last)
        self._next = min(self._next, now + sent.ttl)
        self._index.add(worker, keys, SENT)
        while len(sent.last) > sent.room:
            self._forget_oldest(worker, sent)
        while self._held > self.limit:
            self._forget_oldest(*max(self._sent.items(), key=lambda item: len(item[1].last)))

    def chains(self, worker: Worker) -> Iterator[tuple[float, Keys]]:
        """What the worker was sent and is still taken to hold, oldest first, with the time of each."""
        if (sent := self._sent.get(worker)) is not None:
            yield from ((at, keys) for at, _, keys in (*sent.kept, *sent.order))

    def expire(self, now: float) -> bool:
        """Forget what is too old, a bounded number of chains a call. Returns whether some may be left."""
        if now < self._next:
            return False
        budget = _ROUND
        self._next = math.inf
        for worker, sent in self._sent.items():
            while budget and (oldest := sent.oldest()) is not None and oldest + sent.ttl <= now:
                budget -= 1
                self._forget_oldest(worker, sent)
            if (oldest := sent.oldest()) is not None:
                self._next = min(self._next, oldest + sent.ttl)
        return self._next <= now

    def restore(self, worker: Worker) -> None:
        """The index has cleared the worker: put in again what is still assumed."""
        if (sent := self._sent.get(worker)) is not None and sent.last:
            self._index.add(worker, np.array([*sent.last], np.uint64), SENT)

    def _forget_oldest(self, worker: Worker, sent: _Sent) -> None:
        if mine := sent.pop():
            self._held -= len(mine)
            self._index.remove(worker, np.array(mine, np.uint64), SENT)
