"""What the API server knows of one store: records joined with the leases that hold them and the pods that those live in."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import attrs

from dynamo_core.discovery.contract import Delete, Put
from dynamo_core.discovery.watcher import Watcher
from dynamo_core.ending import ended
from dynamo_kubernetes.api import CONFLICT, NOT_FOUND, Kube, Object, Refused, Unreachable
from dynamo_kubernetes.lease import KubeLease
from dynamo_kubernetes.records import LEASE, STORE, Claim, Pod, lease_name, read_claim, read_pod, read_record
from dynamo_kubernetes.reflect import Reflection

log = logging.getLogger(__name__)

LEASES = "coordination.k8s.io/v1"
_LOOK = 0.3
"""Seconds between two looks for leases whose owners are dead."""
_SOON = 30.0
"""Seconds until a lease that seemed dead and was not is looked at again."""
_LAG = 1.0
"""Seconds for which a lease may be ahead of what we know of its pod."""


def seen(put: Put, claims: Mapping[int, Claim], pods: Mapping[str, Pod], home_uid: str) -> bool:
    """Whether a record counts: its lease is there, and the pod of that is ready. The pod that we run in always counts for ourselves: its readiness may
    depend on what we find."""
    if put.lease is None:
        return True
    claim = claims.get(put.lease)
    if claim is None or claim.pod is None:
        return claim is not None
    pod = pods.get(claim.pod)
    return claim.lives_in(pod) and pod is not None and (pod.ready or pod.uid == home_uid)


@attrs.define
class _Doubt:
    """A lease whose owner gives no sign of life."""

    beat: str
    since: float


class Mirror:
    """Feeds watchers, tells own leases when they are gone, and ends the leases of the dead.

    A lease has ended when its object is gone, which the server decides once and for all: whoever finds a dead owner deletes the lease as it was seen,
    and the server refuses if it was renewed meanwhile.
    """

    def __init__(self, kube: Kube, store: str, pod_selector: str) -> None:
        self.leases: dict[int, KubeLease] = {}
        """Our own, by id."""
        self.home_uid = ""
        self._kube = kube
        self._store = store
        self.selector = f"{STORE}={store}"
        self.paths = kube.path("v1", "configmaps"), kube.path(LEASES, "leases"), kube.path("v1", "pods")
        self._shown: dict[str, Put] = {}
        self._claims: dict[int, Claim] = {}
        self._held: defaultdict[int, set[str]] = defaultdict(set)
        """Names of the records of each lease."""
        self._watchers: set[Watcher] = set()
        self._doubts: dict[int, _Doubt] = {}
        self.records = Reflection(kube, self.paths[0], self.selector, read_record, self._record)
        self.claims = Reflection(kube, self.paths[1], self.selector, read_claim, self._claim)
        self.pods = Reflection(kube, self.paths[2], pod_selector, read_pod, self._pod)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Leases and pods are followed from now on, records from the first watcher on."""
        self._spawn(self.claims.fresh(), "leases")
        self._spawn(self.pods.fresh(), "pods")
        self._spawn(self._look_for_the_dead(), "the dead")

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()
        await ended(*self._tasks)
        for reflection in (self.records, self.claims, self.pods):
            await reflection.close()

    # ------------------------------------------------------------------ watching

    def watch(self, prefix: str, backlog: int) -> Watcher:
        """Starts by itself, once everything that has happened until now is known."""
        watcher = Watcher(prefix, lambda: list(self._shown.values()), backlog)
        self._watchers.add(watcher)
        self._spawn(self._start(watcher), f"watch {prefix}")
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)
        watcher.close()

    async def _start(self, watcher: Watcher) -> None:
        await asyncio.gather(self.records.fresh(), self.claims.fresh(), self.pods.fresh())
        watcher.start()

    def _push(self, change: Put | Delete) -> None:
        for watcher in self._watchers:
            watcher.push(change)

    # ------------------------------------------------------------------ the join

    def _record(self, name: str, before: Put | None, after: Put | None) -> None:
        if before is not None and before.lease is not None:
            self._held[before.lease].discard(name)
            if not self._held[before.lease]:
                del self._held[before.lease]
        if after is not None and after.lease is not None:
            self._held[after.lease].add(name)
        self._show((before or after or Put("", b"")).key, after)

    def _claim(self, _: str, before: Claim | None, after: Claim | None) -> None:
        id = (before or after or Claim(0, "", 0, "", "")).id
        if after is not None:
            self._claims[id] = after
        else:
            del self._claims[id]
            if (mine := self.leases.get(id)) is not None:
                mine.lose()
        if before is None or after is None or attrs.evolve(before, beat=after.beat) != after:
            self._review([id])

    def _pod(self, name: str, before: Pod | None, after: Pod | None) -> None:
        self._review([claim.id for claim in self._claims.values() if claim.pod == name])

    def _review(self, leases: Iterable[int]) -> None:
        for lease in leases:
            for name in list(self._held.get(lease, ())):
                put = self.records.objects.get(name)
                if put is not None:
                    self._show(put.key, put)

    def _show(self, key: str, put: Put | None) -> None:
        if put is not None and not seen(put, self._claims, self.pods.objects, self.home_uid):
            put = None
        if put == self._shown.get(key):
            return
        self._shown.pop(key, None)
        if put is None:
            self._push(Delete(key))
        else:
            self._shown[key] = put
            self._push(put)

    # ------------------------------------------------------------------ the dead

    async def _look_for_the_dead(self) -> None:
        while True:
            await asyncio.sleep(_LOOK * random.uniform(0.5, 1.0))
            for claim in self._dead():
                try:
                    if claim.pod is None or not claim.lives_in(await self._now(claim.pod)):
                        await self.end(claim)
                    else:
                        self._lives(claim, claim.pod)
                except (Refused, Unreachable) as e:
                    log.debug("could not end lease %016x: %s", claim.id, e)
                    break

    def _dead(self) -> list[Claim]:
        """Leases that gave no sign of life for too long, while we were there to see it."""
        now = time.monotonic()
        found: list[Claim] = []
        for id, claim in self._claims.items():
            if claim.pod is not None and claim.lives_in(self.pods.objects.get(claim.pod)):
                self._doubts.pop(id, None)
                continue
            doubt = self._doubts.get(id)
            if doubt is None or doubt.beat != claim.beat:
                doubt = self._doubts[id] = _Doubt(claim.beat, now)
            limit, source = (claim.ttl, self.claims) if claim.pod is None else (_LAG, self.pods)
            if now - max(doubt.since, source.connected_at) > limit:
                found.append(claim)
        self._doubts = {id: doubt for id, doubt in self._doubts.items() if id in self._claims}
        return found

    def _lives(self, claim: Claim, pod: str) -> None:
        """We know too little of its pod, and need not ask again and again."""
        if pod not in self.pods.objects and self.pods.connected_at < time.monotonic() - _LAG:
            log.warning("pod %s holds lease %016x and is none of those that are followed; check `pod_selector`", pod, claim.id)
        if (doubt := self._doubts.get(claim.id)) is not None:
            doubt.since = time.monotonic() + _SOON

    async def _now(self, pod: str) -> Pod | None:
        try:
            return read_pod(await self._kube.call("GET", f"{self.paths[2]}/{pod}"))
        except Refused as e:
            if e.code != NOT_FOUND:
                raise
            return None

    async def end(self, claim: Claim) -> None:
        """Delete a lease as it was seen, and then its records."""
        if await self.delete(f"{self.paths[1]}/{lease_name(claim.id)}", claim.uid, claim.version):
            log.info("lease %016x is dead and was ended", claim.id)
            await self.sweep(claim.id)

    async def sweep(self, lease: int) -> None:
        """Delete what is left of the records of a lease that is gone, and nothing that somebody else wrote since."""
        items, _ = await self._kube.listing(self.paths[0], labelSelector=f"{self.selector},{LEASE}={lease:016x}")
        for item in items:
            metadata: Object = item["metadata"]
            await self.delete(f"{self.paths[0]}/{metadata['name']}", metadata["uid"], metadata["resourceVersion"])

    async def delete(self, path: str, uid: str, version: str) -> bool:
        """Whether it was deleted, as it was seen."""
        try:
            await self._kube.call("DELETE", path, {"preconditions": {"uid": uid, "resourceVersion": version}})
        except Refused as e:
            if e.code not in (NOT_FOUND, CONFLICT):
                raise
            return False
        return True

    def _spawn(self, work: Coroutine[Any, Any, None], what: str) -> None:
        task = asyncio.create_task(work, name=f"discovery: {what}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
