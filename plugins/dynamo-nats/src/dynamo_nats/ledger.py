"""What the messages of the discovery stream mean. Every process reads them in the same order and so comes to the same state.

    l.LEASE        {"ttl": seconds}: the lease is alive; or nothing: it has ended
    k.KEY.LEASE    the value of a key, put under a lease (0: none)
    d.KEY          the key was deleted
    b.READER       nothing; whoever wrote it waits until he reads it, and then knows everything from before

The stream keeps the last message of each subject. A record counts only if its lease is alive where it stands in the stream: whatever an expired owner still
writes, it writes behind its own end.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable

import attrs
import msgspec

from dynamo_core.discovery.contract import Delete, Put

GARBAGE = 60.0
"""Seconds after which messages that mean nothing any more are removed. Who reads the stream anew meanwhile understands them."""

# Parts of that time. A record goes before the message that says why it does not count. A record that another one stands for goes at once: should that
# one be replaced by a message that does not count, this one would seem to count again.
_SUPERSEDED, _RECORD, _MARKER = 0.0, 1.0, 2.0


@attrs.define
class LeaseState:
    ttl: float
    sequence: int
    """The number of its last heartbeat."""
    heard: float
    """When we read that, by our own clock."""


@attrs.frozen
class Record:
    put: Put
    sequence: int
    tokens: str
    """Of the subject that it stands on."""


@attrs.define
class _Reading:
    """What was read of a stream that is read anew, until its end is reached."""

    leases: dict[int, tuple[int, float | None]] = attrs.field(factory=dict)
    records: dict[str, Record] = attrs.field(factory=dict)
    """By tokens."""
    deletes: dict[str, int] = attrs.field(factory=dict)


class _Beat(msgspec.Struct):
    ttl: float


class Ledger:
    """`changed` is told of each change; `ended` of each lease that ends."""

    def __init__(self, changed: Callable[[Put | Delete], None], ended: Callable[[int], None]) -> None:
        self.records: dict[str, Record] = {}
        self.leases: dict[int, LeaseState] = {}
        self.complete = False
        """The present has been read to its end."""
        self._changed = changed
        self._ended = ended
        self._reading: _Reading | None = None
        self._garbage: list[tuple[float, int]] = []
        """When to remove which message."""
        self._barriers: dict[str, tuple[int, float]] = {}
        """Numbers and when we read them, the oldest first. There is one for each process."""
        self._patience = GARBAGE * (1 + random.random())
        """Everybody removes the same things: not at the same moment."""
        self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------ reading anew

    def begin(self) -> None:
        self.complete = False
        self._reading = _Reading()

    def finish(self) -> tuple[dict[str, Record], dict[int, LeaseState]]:
        """The present, as what was read since `begin` makes it."""
        reading, self._reading = self._reading or _Reading(), None
        now = self._loop.time()
        leases = {lease: LeaseState(ttl, sequence, now) for lease, (sequence, ttl) in reading.leases.items() if ttl is not None}
        newest: dict[str, Record] = {}
        for record in reading.records.values():
            lease = record.put.lease
            if lease is not None and lease not in leases and record.sequence > reading.leases.get(lease, (0, None))[0]:
                self._drop(record.sequence, _RECORD)  # written behind the end of its lease
                continue
            before = newest.setdefault(record.put.key, record)
            if before is not record:
                older, newest[record.put.key] = sorted((before, record), key=lambda either: either.sequence)
                self._drop(older.sequence, _SUPERSEDED)
        present: dict[str, Record] = {}
        for key, record in newest.items():
            if record.sequence > reading.deletes.get(key, 0) and (record.put.lease is None or record.put.lease in leases):
                present[key] = record
            else:
                self._drop(record.sequence, _RECORD)
        for sequence in (*reading.deletes.values(), *(sequence for sequence, ttl in reading.leases.values() if ttl is None)):
            self._drop(sequence, _MARKER)
        self.complete = True
        return present, leases

    # ------------------------------------------------------------------ messages

    def read(self, tokens: str, value: bytes, sequence: int) -> None:
        kind, _, rest = tokens.partition(".")
        if kind == "k":
            key, _, lease = rest.partition(".")
            record = Record(Put(_key(key), value, int(lease, 16) or None), sequence, tokens)
            if self._reading is not None:
                self._reading.records[tokens] = record
            else:
                self._put(record)
        elif kind == "d":
            if self._reading is not None:
                self._reading.deletes[_key(rest)] = sequence
            else:
                self._remove(_key(rest))
                self._drop(sequence, _MARKER)
        elif kind == "l":
            ttl = msgspec.json.decode(value, type=_Beat).ttl if value else None
            if self._reading is not None:
                self._reading.leases[int(rest, 16)] = sequence, ttl
            else:
                self._lease(int(rest, 16), ttl, sequence)
        elif kind == "b":
            self._barriers.pop(tokens, None)
            self._barriers[tokens] = sequence, self._loop.time()

    def _put(self, record: Record) -> None:
        lease = record.put.lease
        if lease is not None and lease not in self.leases:
            self._drop(record.sequence, _RECORD)
            return
        before = self.records.get(record.put.key)
        if before is not None and before.tokens != record.tokens:
            self._drop(before.sequence, _SUPERSEDED)
        self.records[record.put.key] = record
        self._changed(record.put)

    def _lease(self, lease: int, ttl: float | None, sequence: int) -> None:
        if ttl is not None:
            self.leases[lease] = LeaseState(ttl, sequence, self._loop.time())
            return
        if self.leases.pop(lease, None) is not None:
            for key in [key for key, record in self.records.items() if record.put.lease == lease]:
                self._remove(key)
        self._drop(sequence, _MARKER)
        self._ended(lease)

    def _remove(self, key: str) -> None:
        if (record := self.records.pop(key, None)) is not None:
            self._drop(record.sequence, _RECORD)
            self._changed(Delete(key))

    # ------------------------------------------------------------------ time

    def heard_now(self) -> None:
        """We were away, and cannot say who was silent meanwhile."""
        for state in self.leases.values():
            state.heard = self._loop.time()

    def silent(self, grace: float, share: float = 1.0) -> list[tuple[int, int]]:
        """Leases that nobody has kept alive for this share of their time, and the numbers of their last heartbeats."""
        now = self._loop.time()
        return [(lease, state.sequence) for lease, state in self.leases.items() if now - state.heard > state.ttl * share + grace]

    def garbage(self) -> list[int]:
        """The numbers of messages that can be removed now."""
        now = self._loop.time()
        due: list[int] = []
        while self._garbage and self._garbage[0][0] <= now:
            due.append(heapq.heappop(self._garbage)[1])
        for tokens, (sequence, read) in list(self._barriers.items()):
            if now - read < 10 * self._patience:
                break
            del self._barriers[tokens]
            due.append(sequence)
        return due

    def _drop(self, sequence: int, delay: float) -> None:
        heapq.heappush(self._garbage, (self._loop.time() + delay * self._patience, sequence))


def token(key: str) -> str:
    """A key as one token of a subject."""
    return urlsafe_b64encode(key.encode()).decode().rstrip("=")


def _key(token: str) -> str:
    """:raises ValueError: it is none."""
    return b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode("ascii")
