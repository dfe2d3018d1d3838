"""What was sent to a worker is assumed to be in its cache: for a while, and up to what the cache can hold.

This is all that is known of workers that publish no events, and it bridges the moment between a decision and the event that confirms it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import repeat

import attrs

from dynamo_core.kv.hashing import Keys
from dynamo_core.routing.contract import Worker
from dynamo_kv_router.index import Index, Match

_ROUND = 8
"""Entries that one call looks at, at most, so that no request pays for many others."""


@attrs.define(eq=False)
class _Sent:
    """Chains sent to one worker, oldest first."""

    room: int
    """Blocks that it may hold."""
    order: deque[tuple[float, int, Keys]] = attrs.field(factory=deque[tuple[float, int, Keys]])
    last: dict[int, int] = attrs.field(factory=dict[int, int])
    """Key to the number of the latest chain with it."""


class Recent:
    """Least recently sent goes first, leaf before root: a chain gives up only the blocks that no later chain has touched, and those are its end."""

    def __init__(self, ttl: float, *, limit: int = 2_000_000, room: Callable[[Worker], int] | None = None) -> None:
        """:param ttl: seconds that a chain counts after it was sent. :param limit: keys in all. :param room: blocks that a worker can hold."""
        self.ttl = ttl
        self.limit = limit
        self._room: Callable[[Worker], int] = room or (lambda worker: limit)
        self._index = Index(limit * 2, shards=64)
        self._sent: dict[Worker, _Sent] = {}
        self._number = 0
        self._held = 0

    def __len__(self) -> int:
        """(Worker, key) pairs."""
        return self._held

    def join(self, worker: Worker) -> None:
        if worker not in self._sent:
            self._sent[worker] = _Sent(max(1, self._room(worker)))
            self._index.join(worker)

    def drop_worker(self, worker: Worker) -> None:
        if (sent := self._sent.pop(worker, None)) is not None:
            self._held -= len(sent.last)
            self._index.drop_worker(worker)

    def record(self, worker: Worker, keys: Keys, now: float) -> None:
        """`worker` is being sent a prompt with these blocks."""
        if (sent := self._sent.get(worker)) is None or not len(keys):
            return
        keys = keys[: sent.room]
        self._number += 1
        self._held -= len(sent.last)
        sent.last.update(zip(keys.tolist(), repeat(self._number)))
        self._held += len(sent.last)
        sent.order.append((now, self._number, keys))
        self._index.add(worker, keys)
        while len(sent.last) > sent.room:
            self._forget_oldest(worker, sent)
        self._prune(worker)

    def match(self, keys: Keys, now: float) -> Match:
        self.expire(now)
        return self._index.match(keys)

    def expire(self, now: float) -> None:
        """Forget what is too old, a bounded number of chains a call."""
        before = now - self.ttl
        budget = _ROUND
        for worker, sent in self._sent.items():
            while sent.order and sent.order[0][0] <= before:
                if not budget:
                    return
                budget -= 1
                self._forget_oldest(worker, sent)

    def _prune(self, worker: Worker) -> None:
        """Over the limit, the worker that holds most gives way."""
        while self._held > self.limit:
            worker, sent = max(self._sent.items(), key=lambda item: len(item[1].last))
            for _ in range(min(_ROUND, len(sent.order))):
                self._forget_oldest(worker, sent)

    def _forget_oldest(self, worker: Worker, sent: _Sent) -> None:
        _, number, keys = sent.order.popleft()
        names, last = keys.tolist(), sent.last
        # What a later chain shares with this one is a prefix of both: look for its end.
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) >> 1
            if last.get(names[middle]) == number:
                high = middle
            else:
                low = middle + 1
        if low < len(names):
            for name in names[low:]:
                del last[name]
            self._held -= len(names) - low
            self._index.remove(worker, keys[low:])
