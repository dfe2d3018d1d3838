"""Discovery in the Kubernetes API server: for fleets that run there anyway, with nothing else to install."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

import attrs
from attrs import validators as v

from dynamo_core.discovery.contract import LEASE_TTL, Change, Lease, Put
from dynamo_core.discovery.limits import check_key, check_value
from dynamo_core.errors import ConfigError, LeaseLost, Problem, StoreUnavailable
from dynamo_kubernetes.api import CONFLICT, NOT_FOUND, Kube, Object, Refused, Unreachable
from dynamo_kubernetes.connection import Connection
from dynamo_kubernetes.lease import KubeLease, speaking
from dynamo_kubernetes.mirror import Mirror, seen
from dynamo_kubernetes.records import Claim, Home, lease_name, lease_object, read_claim, read_pod, read_record, record_name, record_object

log = logging.getLogger(__name__)

_FAREWELL = 5.0
"""Seconds for which leaving waits for the API server."""
_STATUS = 30.0
"""Seconds that the kubelet may take to say that our container runs."""


@attrs.define(eq=False)
class KubernetesDiscovery(Connection):
    """A store in one namespace of a cluster."""

    store: str = attrs.field(default="dynamo", validator=v.matches_re(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?"))
    """Fleets with different stores do not see each other."""
    pod: str | None = None
    """The pod that this process runs in. Default: `$POD_NAME`; "" for none, and then leases live by heartbeats."""
    container: str | None = None
    """Its container. Default: `$DYNAMO_CONTAINER`; needed where the pod has several."""
    pod_selector: str = ""
    """Labels of the pods whose readiness is followed, as `app=chat`; all of the namespace by default."""
    backlog: int = attrs.field(default=4096, validator=v.ge(1))
    """Changes that wait for one slow watcher; past that it is sent the present anew."""

    _kube: Kube | None = attrs.field(init=False, default=None, repr=False)
    _mirror: Mirror = attrs.field(init=False, default=None, repr=False)
    _versions: dict[str, str] = attrs.field(init=False, factory=dict[str, str], repr=False)
    """Resource version of each record that we wrote last, so that writing it again costs one call."""

    # ------------------------------------------------------------------ opening and closing

    async def __aenter__(self) -> KubernetesDiscovery:
        kube = self.kube()
        mirror = Mirror(kube, self.store, self.pod_selector)
        await kube.__aenter__()
        try:
            for path, selector in zip(mirror.paths, (mirror.selector, mirror.selector, self.pod_selector), strict=True):
                await kube.call("GET", path, limit="1", labelSelector=selector)
        except Refused as e:
            await kube.__aexit__()
            remedy = "bind the role of deploy/ to its service account" if e.code == 403 else "check the credentials" if e.code == 401 else ""
            raise ConfigError(Problem(f"the API server at {kube.server} refuses us: {e}", remedy=remedy)) from e
        except BaseException as e:
            await kube.__aexit__()
            if isinstance(e, Unreachable):
                raise StoreUnavailable(str(e)) from e
            raise
        self._kube, self._mirror = kube, mirror
        mirror.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        kube = self._open()
        leases = list(self._mirror.leases.values())
        if leases:
            done, _ = await asyncio.wait([asyncio.create_task(held.revoke()) for held in leases], timeout=_FAREWELL)
            for task in done:
                if (error := task.exception()) is not None:
                    log.warning("left a lease to expire by itself: %s", error)
        for held in leases:
            await held.stop()
        await self._mirror.close()
        self._kube = None
        await kube.__aexit__()

    # ------------------------------------------------------------------ keys

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> None:
        check_key(key)
        check_value(key, value)
        kube, records = self._open(), self._mirror.paths[0]
        name = record_name(self.store, key)
        path = f"{records}/{name}"
        version = self._versions.get(name, "")
        with speaking(f"to write {key!r}"):
            while True:
                # The lease is asked after the version was read, and the write counts only on that version: whatever a dead owner still has on the way
                # cannot replace what its successor wrote.
                claim = await self._check(lease, key)
                content = record_object(self.store, key, value, claim)
                try:
                    if version:
                        content["metadata"]["resourceVersion"] = version
                        written = await kube.call("PUT", path, content)
                    else:
                        written = await kube.call("POST", records, content)
                except Refused as e:
                    if e.code != CONFLICT and not (version and e.code == NOT_FOUND):
                        raise
                    found = await self._find(path)
                    version = found["metadata"]["resourceVersion"] if found is not None else ""
                    continue
                self._versions[name] = written["metadata"]["resourceVersion"]
                return

    async def get(self, key: str) -> bytes | None:
        self._open()
        with speaking(f"to read {key!r}"):
            found = await self._find(f"{self._mirror.paths[0]}/{record_name(self.store, key)}")
            put = read_record(found) if found is not None else None
            if put is None:
                return None
            return put.value if put.lease is None or await self._counts(put) else None

    async def items(self, prefix: str) -> Mapping[str, bytes]:
        kube = self._open()
        records, leases, pods = self._mirror.paths
        with speaking(f"to read {prefix!r}"):
            found, _ = await kube.listing(records, labelSelector=self._mirror.selector)
            puts = [put for item in found if (put := read_record(item)) is not None and put.key.startswith(prefix)]
            claims: dict[int, Claim] = {}
            if any(put.lease for put in puts):
                claims = {claim.id: claim for claim in map(read_claim, (await kube.listing(leases, labelSelector=self._mirror.selector))[0])}
            homes = {}
            if any(claim.pod for claim in claims.values()):
                listed, _ = await kube.listing(pods, **({"labelSelector": self.pod_selector} if self.pod_selector else {}))
                homes = {item["metadata"]["name"]: read_pod(item) for item in listed}
        return {put.key: put.value for put in puts if seen(put, claims, homes, self._mirror.home_uid)}

    async def delete(self, key: str) -> None:
        kube, name = self._open(), record_name(self.store, key)
        with speaking(f"to delete {key!r}"):
            self._versions.pop(name, None)
            try:
                await kube.call("DELETE", f"{self._mirror.paths[0]}/{name}")
            except Refused as e:
                if e.code != NOT_FOUND:
                    raise

    @asynccontextmanager
    async def watch(self, prefix: str) -> AsyncGenerator[AsyncIterator[Change], None]:
        self._open()
        watcher = self._mirror.watch(prefix, self.backlog)
        try:
            yield watcher
        finally:
            self._mirror.unwatch(watcher)

    def problem(self) -> str | None:
        return self._kube.trouble if self._kube is not None else None

    # ------------------------------------------------------------------ leases

    async def lease(self, ttl: float = LEASE_TTL) -> KubeLease:
        kube = self._open()
        with speaking("a lease"):
            home = await self._home()
            # Our own random id: an answer that is lost on its way never leads to one id for two leases.
            id = secrets.randbits(62) + 1
            holder = f"{home.pod}/{home.container}" if home is not None else f"{socket.gethostname()}/{os.getpid()}"
            granted = await kube.call("POST", self._mirror.paths[1], lease_object(self.store, id, math.ceil(ttl), home, holder))
        held = KubeLease(kube, f"{self._mirror.paths[1]}/{lease_name(id)}", read_claim(granted), self._ended, self._mirror.sweep)
        self._mirror.leases[id] = held
        return held

    def _ended(self, id: int) -> None:
        self._mirror.leases.pop(id, None)

    async def _home(self) -> Home | None:
        """Our pod and container, once the kubelet says that it runs. If it still speaks of the container before, the lease ends soon and is taken anew."""
        name = self.pod if self.pod is not None else os.environ.get("POD_NAME", "")
        if not name:
            return None
        wanted = self.container or os.environ.get("DYNAMO_CONTAINER")
        try:
            async with asyncio.timeout(_STATUS):
                while True:
                    found = await self._find(f"{self._mirror.paths[2]}/{name}")
                    if found is None:
                        raise StoreUnavailable(f"there is no pod {name!r} in namespace {self._mirror.paths[2].split('/')[-2]!r}; check `pod` or $POD_NAME")
                    containers = [str(c["name"]) for c in found["spec"]["containers"]]
                    if wanted is None and len(containers) > 1:
                        raise ConfigError(Problem(f"pod {name!r} has the containers {', '.join(containers)}, and which one this is cannot be known",
                                                  remedy="set `container`, or $DYNAMO_CONTAINER"))
                    container, pod = wanted or containers[0], read_pod(found)
                    if container not in containers:
                        raise ConfigError(Problem(f"pod {name!r} has no container {container!r}; it has {', '.join(containers)}",
                                                  remedy="check `container` or $DYNAMO_CONTAINER"))
                    if pod.containers.get(container) and not pod.ended:
                        self._mirror.home_uid = pod.uid
                        return Home(name, pod.uid, container, pod.containers[container])
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise StoreUnavailable(f"the kubelet has not said within {_STATUS:g} s that our container in pod {name!r} runs") from None

    async def _check(self, lease: Lease | None, key: str) -> Claim | None:
        """:raises LeaseLost: it is gone."""
        if lease is None:
            return None
        found = await self._find(f"{self._mirror.paths[1]}/{lease_name(lease.id)}")
        if found is not None:
            return read_claim(found)
        if (mine := self._mirror.leases.get(lease.id)) is not None:
            mine.lose()
        raise LeaseLost(f"lease {lease.id:x} is gone, so {key!r} was not written under it")

    async def _counts(self, put: Put) -> bool:
        assert put.lease is not None
        found = await self._find(f"{self._mirror.paths[1]}/{lease_name(put.lease)}")
        if found is None:
            return False
        claim = read_claim(found)
        home = await self._find(f"{self._mirror.paths[2]}/{claim.pod}") if claim.pod is not None else None
        return seen(put, {claim.id: claim}, {claim.pod: read_pod(home)} if claim.pod and home else {}, self._mirror.home_uid)

    # ------------------------------------------------------------------ the server

    async def _find(self, path: str) -> Object | None:
        try:
            return await self._open().call("GET", path)
        except Refused as e:
            if e.code != NOT_FOUND:
                raise
            return None

    def _open(self) -> Kube:
        if self._kube is None:
            raise StoreUnavailable("kubernetes discovery is not open")
        return self._kube
