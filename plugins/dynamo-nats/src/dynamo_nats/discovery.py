"""Discovery in a JetStream stream, for fleets that run NATS anyway.

The stream is a log that every process reads in the same order (`ledger.py` says what it means). Time is judged by the readers: a lease that nobody
keeps alive is ended by whoever notices first, with a message that the servers accept only if no heartbeat came in between.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import attrs
import msgspec
from attrs import validators as v
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js.api import DiscardPolicy, StreamConfig, StreamInfo
from nats.js.errors import APIError

from dynamo_core.discovery.contract import LEASE_TTL, Change, Delete, Lease, Put
from dynamo_core.discovery.limits import check_key, check_value
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.ending import ended
from dynamo_core.errors import LeaseLost, StoreUnavailable
from dynamo_nats.connection import Connection, NatsOptions
from dynamo_nats.ledger import Ledger, token
from dynamo_nats.stream import Replay, Stream

log = logging.getLogger(__name__)

_LOOK = 0.25
"""Seconds between two looks for leases that ran out."""
_PROOF = 1.0
"""Seconds in which a stream that works takes a message; and between two proofs of that, while somebody is silent."""
_GRACE = 0.3
"""Seconds beyond its ttl that a lease is given: heartbeats travel."""
_WRONG_SEQUENCE = 10071
"""Somebody wrote to that subject in between."""
_FAREWELL = 3.0


class NatsLease:
    """A lease that this process keeps alive by a message every third of `ttl`."""

    def __init__(self, store: NatsDiscovery, id: int, ttl: float, sequence: int) -> None:
        self.id = id
        self.ttl = ttl
        self.lost = asyncio.Event()
        self.revoked = False
        self._store = store
        self._sequence = sequence
        self._abandoned = False
        self._keeper = asyncio.create_task(self._keep_alive(), name=f"discovery: keep lease {id:x} alive")

    async def revoke(self) -> None:
        if not self.revoked and not self.lost.is_set():
            self.revoked = True
            self._keeper.cancel()
            await self._store.end(self, self._sequence)

    def abandon(self) -> None:
        """Stop keeping the lease alive, as a crash would: it expires after `ttl`."""
        self._abandoned = True

    def ended(self) -> None:
        """The stream says that the lease is over."""
        self._keeper.cancel()
        if not self.revoked and not self.lost.is_set():
            self.lost.set()
            log.warning("lost lease %016x", self.id)

    def stop(self) -> None:
        self._keeper.cancel()

    async def _keep_alive(self) -> None:
        wait = self.ttl / 3
        while not (self.revoked or self.lost.is_set()):  # the client may swallow the cancellation that ends this
            await asyncio.sleep(wait)
            if self._abandoned:
                continue
            try:
                self._sequence = await self._store.beat(self, self._sequence)
                wait = self.ttl / 3
            except StoreUnavailable:
                wait = min(0.5, self.ttl / 3)
            except LeaseLost:
                self.ended()


@attrs.define(eq=False, kw_only=True)
class NatsDiscovery(NatsOptions):
    """A store in JetStream, which must be on. Values need `max_payload` of the servers to be at least their size."""

    replicas: int = attrs.field(default=1, validator=[v.ge(1), v.le(5)])
    """Servers that hold the stream; 3 in a cluster that may lose one."""
    timeout: float = attrs.field(default=3.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which a call counts as unanswered."""
    backlog: int = attrs.field(default=4096, validator=v.ge(1))
    """Changes that wait for one slow watcher; past that it is sent the present anew."""
    wiped_grace: float = attrs.field(default=10.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which known records stay in use after NATS lost the stream, while their owners register again."""

    _connection: Connection | None = attrs.field(init=False, default=None, repr=False)
    _stream: Stream = attrs.field(init=False, repr=False)
    _reader: Replay = attrs.field(init=False, repr=False)
    _ledger: Ledger = attrs.field(init=False, repr=False)
    _me: str = attrs.field(init=False, factory=lambda: secrets.token_hex(8), repr=False)
    _created: object = attrs.field(init=False, default=None, repr=False)
    _wiped: bool = attrs.field(init=False, default=False, repr=False)
    _held: dict[str, asyncio.TimerHandle] = attrs.field(init=False, factory=dict, repr=False)
    _leases: dict[int, NatsLease] = attrs.field(init=False, factory=dict, repr=False)
    _watchers: set[Watcher] = attrs.field(init=False, factory=set, repr=False)
    _waiting: list[tuple[int, asyncio.Future[None]]] = attrs.field(init=False, factory=list, repr=False)
    _barrier: int = attrs.field(init=False, default=0, repr=False)
    _target: int = attrs.field(init=False, default=0, repr=False)
    _applied: int = attrs.field(init=False, default=0, repr=False)
    _proven: float = attrs.field(init=False, default=0.0, repr=False)
    _looker: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)

    # ------------------------------------------------------------------ opening and closing

    async def __aenter__(self) -> NatsDiscovery:
        connection = Connection(self, f"dynamo-discovery-{self._me}", 1024)
        try:
            await connection.open()
        except OSError as e:
            raise StoreUnavailable(str(e)) from e
        self._connection = connection
        self._stream = Stream(connection, StreamConfig(
            name=f"{self.prefix.replace('.', '_')}_DISCOVERY", subjects=[f"{self.prefix}.discovery.>"], max_msgs_per_subject=1,
            discard=DiscardPolicy.NEW, num_replicas=self.replicas))
        self._ledger = Ledger(self._changed, self._lease_ended)
        self._reader = Replay(self._stream, f"{self.prefix}.discovery.>", f"{self.prefix}.replay.{self._me}", self._message, self._began)
        try:
            await self._stream.check()
            self._reader.open()
            self._looker = asyncio.create_task(self._look(), name="discovery: look for leases that ran out")
            await self._sync()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                results = await asyncio.gather(*(lease.revoke() for lease in list(self._leases.values())), return_exceptions=True)
                for error in results:
                    if isinstance(error, Exception):
                        log.warning("left a lease to expire by itself: %s", error)
                if self._connection is not None and self._connection.up:
                    await self._remove(self._barrier)
        await self._leave()

    async def _leave(self) -> None:
        connection, self._connection = self._connection, None
        if self._looker is not None:
            await ended(self._looker)
            self._looker = None
            await self._reader.close()
        for lease in self._leases.values():
            lease.stop()
        for handle in self._held.values():
            handle.cancel()
        for watcher in self._watchers:
            watcher.close()
        if connection is not None:
            await connection.close()

    # ------------------------------------------------------------------ keys

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        check_key(key)
        check_value(key, value)
        if lease is not None and (lease.lost.is_set() or (isinstance(lease, NatsLease) and lease.revoked)):
            raise LeaseLost(f"lease {lease.id:x} is gone, so {key!r} was not written under it")
        sequence = await self._write(f"k.{token(key)}.{lease.id if lease else 0:x}", bytes(value))
        await self._reach(sequence)
        if lease is not None and lease.id not in self._ledger.leases:
            raise LeaseLost(f"lease {lease.id:x} is gone, so {key!r} was not written under it")

    async def get(self, key: str) -> bytes | None:
        await self._sync()
        record = self._ledger.records.get(key)
        return record.put.value if record else None

    async def items(self, prefix: str) -> Mapping[str, bytes]:
        await self._sync()
        return {key: record.put.value for key, record in self._ledger.records.items() if key.startswith(prefix)}

    async def delete(self, key: str) -> None:
        await self._sync()
        if key in self._ledger.records:
            await self._reach(await self._write(f"d.{token(key)}", b""))

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change], None]:
        watcher = Watcher(prefix, lambda: [record.put for record in self._ledger.records.values()], self.backlog)
        self._watchers.add(watcher)
        try:
            with suppress(StoreUnavailable):
                await self._sync()
                watcher.start()
            if self._connection is None:
                raise StoreUnavailable("nats discovery is not open")
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def problem(self) -> str | None:
        if self._connection is None:
            return None
        if not self._connection.up:
            return self._connection.problem()
        return None if self._ledger.complete else f"the stream {self._stream.name} has not been read to its end"

    # ------------------------------------------------------------------ leases

    async def lease(self, ttl: float = LEASE_TTL) -> NatsLease:
        id = secrets.randbits(62) + 1
        sequence = await self._write(f"l.{id:x}", msgspec.json.encode({"ttl": ttl}), after=0)
        await self._reach(sequence)
        lease = self._leases[id] = NatsLease(self, id, ttl, sequence)
        return lease

    async def beat(self, lease: NatsLease, sequence: int) -> int:
        """Keep it alive. :raises LeaseLost: it has ended. :raises StoreUnavailable: no answer."""
        try:  # one whose answer is lost with a server must leave time for others
            return await self._write(f"l.{lease.id:x}", msgspec.json.encode({"ttl": lease.ttl}), after=sequence, patience=lease.ttl / 5)
        except _Overtaken:
            await self._sync()
            if (state := self._ledger.leases.get(lease.id)) is None:
                raise LeaseLost(f"lease {lease.id:x} is gone") from None
            return state.sequence  # it was our own heartbeat, whose answer was lost

    async def end(self, lease: NatsLease, sequence: int) -> None:
        """A lease ends once: its end says which records count, and must not move."""
        self._leases.pop(lease.id, None)
        try:
            await self._reach(await self._write(f"l.{lease.id:x}", b"", after=sequence))
        except _Overtaken:
            await self._sync()
            state = self._ledger.leases.get(lease.id)
            # By our own heartbeat, whose answer was lost. With nothing newer the stream has lost the lease, and there is nothing to end.
            if state is not None and state.sequence > sequence:
                await self.end(lease, state.sequence)

    async def _look(self) -> None:
        """End leases that ran out, and sweep."""
        while True:
            await asyncio.sleep(_LOOK)
            if self._connection is None or not self._connection.up or not self._ledger.complete:
                self._ledger.heard_now()
                continue
            try:
                if self._ledger.silent(0.0, 0.5):
                    await self._prove()
                for lease, sequence in self._ledger.silent(_GRACE):
                    with suppress(_Overtaken):
                        await self._write(f"l.{lease:x}", b"", after=sequence, patience=_PROOF)
            except StoreUnavailable:
                self._ledger.heard_now()
                continue
            with suppress(StoreUnavailable):
                for sequence in self._ledger.garbage():
                    await self._remove(sequence)

    async def _prove(self) -> None:
        """The stream takes messages, so that who is silent is silent indeed: a stream without a leader is silent for all.

        :raises StoreUnavailable: it does not, or not promptly.
        """
        now = asyncio.get_running_loop().time
        if (started := now()) - self._proven < _PROOF:
            return
        self._barrier = await self._write(f"b.{self._me}", b"", patience=_PROOF)
        await self._reach(self._barrier)
        if now() - started > _PROOF:
            raise StoreUnavailable("NATS takes its time")
        self._proven = now()

    def _lease_ended(self, lease: int) -> None:
        if (mine := self._leases.pop(lease, None)) is not None:
            mine.ended()

    # ------------------------------------------------------------------ the stream

    async def _write(self, tokens: str, value: bytes, after: int | None = None, patience: float = math.inf) -> int:
        """Append a message, if the last one on its subject still is `after`. Returns its number."""
        connection, patience = self._open(), min(self.timeout, patience)
        headers = None if after is None else {"Nats-Expected-Last-Subject-Sequence": str(after)}
        try:
            stream = connection.client.jetstream(timeout=patience)
            return (await stream.publish(f"{self.prefix}.discovery.{tokens}", value, headers=headers)).seq
        except MaxPayloadError:
            raise ValueError(f"a value of {len(value)} bytes is more than NATS takes: raise max_payload of the servers") from None
        except APIError as e:
            if e.err_code == _WRONG_SEQUENCE:
                raise _Overtaken from None
            raise StoreUnavailable(f"NATS refused to store: {e}") from e
        except (NatsError, TimeoutError) as e:
            raise StoreUnavailable(f"NATS did not store within {patience:g} s: {e or type(e).__name__}") from e

    async def _remove(self, sequence: int) -> None:
        """By its number, and never by purging a subject: nats-server 2.9 skips messages of other subjects for readers that are a moment behind."""
        with suppress(NatsError, TimeoutError):  # most often, somebody else has removed it
            await self._open().client.jetstream(timeout=self.timeout).delete_msg(self._stream.name, sequence)

    async def _sync(self) -> None:
        """Return once everything has been read that was in the stream when this was called."""
        self._barrier = await self._write(f"b.{self._me}", b"")
        await self._reach(self._barrier)

    async def _reach(self, sequence: int) -> None:
        if self._applied >= sequence and self._ledger.complete:
            return
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((sequence, reached))
        try:
            async with asyncio.timeout(self.timeout):  # wait_for may swallow a cancellation
                await reached
        except TimeoutError:
            raise StoreUnavailable(f"NATS did not tell what it stores within {self.timeout:g} s") from None
        finally:
            self._waiting = [entry for entry in self._waiting if entry[1] is not reached]

    def _open(self) -> Connection:
        if self._connection is None:
            raise StoreUnavailable("nats discovery is not open")
        if not self._connection.up:
            raise StoreUnavailable(self._connection.problem() or "NATS is away")
        return self._connection

    # ------------------------------------------------------------------ reading

    async def _began(self, stream: StreamInfo) -> None:
        created = getattr(stream, "created", None)
        self._wiped = self._created is not None and created != self._created
        self._created = created
        self._applied = 0
        self._ledger.begin()
        self._barrier = self._target = await self._write(f"b.{self._me}", b"")

    def _message(self, message: Msg, sequence: int) -> None:
        tokens = message.subject[len(self.prefix) + len(".discovery.") :]
        try:
            self._ledger.read(tokens, message.data, sequence)
        except (ValueError, msgspec.DecodeError) as e:
            log.warning("skipped a message of the discovery stream that is not understood: %s: %s", tokens, e)
        self._applied = sequence
        if not self._ledger.complete and sequence >= self._target:
            self._finish()
        if self._ledger.complete and self._waiting:
            for wanted, reached in self._waiting:
                if wanted <= sequence and not reached.done():
                    reached.set_result(None)

    def _finish(self) -> None:
        """The end of the stream is reached: pass on how the present differs from what is known."""
        present, leases = self._ledger.finish()
        if self._wiped:
            log.warning("NATS has lost the discovery stream; known records stay in use for %g s", self.wiped_grace)
        self._ledger.leases = leases
        for key in [key for key in self._ledger.records if key not in present and key not in self._held]:
            if self._wiped:
                self._held[key] = asyncio.get_running_loop().call_later(self.wiped_grace, self._release, key)
            else:
                del self._ledger.records[key]
                self._changed(Delete(key))
        for key, record in sorted(present.items(), key=lambda item: item[1].sequence):
            before = self._ledger.records.get(key)
            self._ledger.records[key] = record
            if before is None or before.put != record.put:
                self._changed(record.put)
        for lease in [lease for lease in self._leases if lease not in leases]:
            self._lease_ended(lease)
        for watcher in self._watchers:
            watcher.start()

    def _release(self, key: str) -> None:
        if self._held.pop(key, None) is not None and self._ledger.records.pop(key, None) is not None:
            self._changed(Delete(key))

    def _changed(self, change: Put | Delete) -> None:
        if (held := self._held.pop(change.key, None)) is not None:
            held.cancel()
        for watcher in self._watchers:
            watcher.push(change)


class _Overtaken(Exception):
    """Somebody else wrote first."""
