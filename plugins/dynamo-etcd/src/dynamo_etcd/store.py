"""Discovery in etcd, for fleets of more than one machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
from attrs import validators as v

from dynamo_core.config.schema import Secret
from dynamo_core.discovery.contract import LEASE_TTL, Change, Lease
from dynamo_core.discovery.limits import check_key, check_value
from dynamo_core.errors import ConfigError, LeaseLost, Problem, StoreUnavailable
from dynamo_etcd.follow import Follower, read
from dynamo_etcd.gateway import INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, EtcdTls, Gateway, Refused
from dynamo_etcd.lease import EtcdLease
from dynamo_etcd.wire import Answer, Found

log = logging.getLogger(__name__)

_PING = "ping"
"""A key that nobody writes: reading it proves that the cluster has a leader and that we may read."""
_FAREWELL = 5.0
"""Seconds for which leaving waits for etcd."""


def _is_url(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[str, ...]) -> None:
    if not value or not all(endpoint.startswith(("http://", "https://")) for endpoint in value):
        raise ValueError(f"'{attribute.name}' must be URLs such as http://10.0.0.1:2379")


@attrs.define(eq=False)
class EtcdDiscovery:
    """A store in an etcd cluster (3.4 or later)."""

    endpoints: tuple[str, ...] = attrs.field(default=("http://127.0.0.1:2379",), validator=_is_url)
    """Client URLs of the members; one is in use at a time, the others when it fails."""
    prefix: str = attrs.field(default="dynamo/", validator=v.min_len(1))
    """What all keys of the fleet begin with in etcd."""
    user: str | None = None
    """The etcd user, where authentication is on."""
    password: Secret | None = attrs.field(default=None, repr=False)
    """Its password, as `file:/path` or `env:NAME`."""
    tls: EtcdTls | None = None
    """Certificates, for `https` endpoints."""
    timeout: float = attrs.field(default=3.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after which a call counts as unanswered, all endpoints together."""
    ping_interval: float = attrs.field(default=1.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds between two looks whether the endpoint in use still works."""
    backlog: int = attrs.field(default=4096, validator=v.ge(1))
    """Changes that wait for one slow watcher; past that it is sent the present anew."""
    wiped_grace: float = attrs.field(default=10.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which known records stay in use after etcd lost its data, while their owners register again."""

    _gateway: Gateway = attrs.field(init=False, repr=False)
    _pinger: asyncio.Task[None] | None = attrs.field(init=False, default=None, repr=False)
    _revision: int = attrs.field(init=False, default=0, repr=False)
    _leases: dict[int, EtcdLease] = attrs.field(init=False, factory=dict, repr=False)
    _followers: set[Follower] = attrs.field(init=False, factory=set, repr=False)

    # ------------------------------------------------------------------ opening and closing

    async def __aenter__(self) -> EtcdDiscovery:
        self._gateway = Gateway(self.endpoints, self.user, self.password, self.tls, self.timeout)
        await self._gateway.open()
        try:
            await self._ping()
        except BaseException as e:
            await self._gateway.close()
            if isinstance(e, Refused):
                raise self._refused_us(e) from e
            raise
        self._pinger = asyncio.create_task(self._keep_pinging(), name="discovery: ping etcd")
        return self

    async def __aexit__(self, *exc: object) -> None:
        pinger, self._pinger = self._pinger, None
        if pinger is not None:
            pinger.cancel()
            await asyncio.wait([pinger])
        for follower in list(self._followers):
            await follower.close()
        leases = list(self._leases.values())
        if leases:
            done, _ = await asyncio.wait([asyncio.create_task(lease.revoke()) for lease in leases], timeout=_FAREWELL)
            for task in done:
                if (error := task.exception()) is not None:
                    log.warning("left a lease to expire by itself: %s", error)
        for lease in leases:
            lease.stop()
        await self._gateway.close()

    # ------------------------------------------------------------------ keys

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        check_key(key)
        check_value(key, value)
        try:
            await self._call().call("kv/put", {"key": self._key(key), "value": bytes(value), "lease": lease.id if lease else 0}, Answer)
        except Refused as e:
            if lease is None or e.code != NOT_FOUND:
                raise self._refused(f"to write {key!r}", e) from e
            if (mine := self._leases.get(lease.id)) is not None:
                mine.lose()
            raise LeaseLost(f"lease {lease.id:x} is gone, so {key!r} was not written under it") from e

    async def get(self, key: str) -> bytes | None:
        try:
            found = await self._call().call("kv/range", {"key": self._key(key)}, Found)
        except Refused as e:
            raise self._refused(f"to read {key!r}", e) from e
        return found.kvs[0].value if found.kvs else None

    async def items(self, prefix: str) -> Mapping[str, bytes]:
        try:
            records, _ = await read(self._call(), self._key(prefix))
        except Refused as e:
            raise self._refused(f"to read {prefix!r}", e) from e
        return {record.key[len(self.prefix) :].decode("ascii", "replace"): record.value for record in records}

    async def delete(self, key: str) -> None:
        try:
            await self._call().call("kv/deleterange", {"key": self._key(key)}, Answer)
        except Refused as e:
            raise self._refused(f"to delete {key!r}", e) from e

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change], None]:
        follower = Follower(self._call(), self.prefix.encode(), prefix, self.backlog, self.wiped_grace)
        self._followers.add(follower)
        try:
            yield follower.watcher
        finally:
            self._followers.discard(follower)
            await follower.close()

    async def lease(self, ttl: float = LEASE_TTL) -> EtcdLease:
        try:
            lease = await EtcdLease.grant(self._call(), ttl, self._ended)
        except Refused as e:
            raise self._refused("a lease", e) from e
        self._leases[lease.id] = lease
        return lease

    def problem(self) -> str | None:
        return self._gateway.trouble

    # ------------------------------------------------------------------ is it there?

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(self.ping_interval)
            try:
                await self._ping()
            except StoreUnavailable:
                pass  # the gateway has told
            except Refused as e:
                log.warning("etcd refuses us: %s", e)

    async def _ping(self) -> None:
        """One linearizable read. A revision that went back tells of a store that lost its data, and our leases with it."""
        before = self._revision
        answer = await self._gateway.call("kv/range", {"key": self._key(_PING)}, Found)
        if answer.header.revision < before:
            log.warning("etcd has lost its data: its revision went from %d to %d", before, answer.header.revision)
            for lease in list(self._leases.values()):
                lease.check()
        self._revision = answer.header.revision

    def _ended(self, lease: EtcdLease) -> None:
        self._leases.pop(lease.id, None)

    def _call(self) -> Gateway:
        if self._pinger is None:
            raise StoreUnavailable("etcd discovery is not open")
        return self._gateway

    def _key(self, key: str) -> bytes:
        return (self.prefix + key).encode()

    def _refused(self, what: str, because: Refused) -> StoreUnavailable:
        return StoreUnavailable(f"etcd refused {what}: {because}")

    def _refused_us(self, because: Refused) -> Exception:
        if because.code == PERMISSION_DENIED:
            return ConfigError(Problem(f"etcd user {self.user!r} may not read keys that begin with {self.prefix!r}",
                                       remedy="grant its role READWRITE on that prefix"))
        if because.code != INVALID_ARGUMENT:
            return self._refused("us", because)
        if self.user is None:
            return ConfigError(Problem(f"etcd at {self.endpoints[0]} asks who we are: {because}", remedy="set `user` and `password` of the discovery store"))
        return ConfigError(Problem(f"etcd at {self.endpoints[0]} does not let user {self.user!r} in: {because}",
                                   remedy="check `user` and `password` of the discovery store"))
