"""Discovery of processes in pods: their records come and go with the pod's readiness, their leases with the container."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from dynamo_core.contracts import DiscoveryContract
from dynamo_core.discovery.contract import Delete, Put, Synced
from dynamo_core.errors import ConfigError, LeaseLost, StoreUnavailable
from dynamo_kubernetes.api import MERGE_PATCH
from dynamo_kubernetes.discovery import KubernetesDiscovery

pytestmark = pytest.mark.slow
GUARD = 30.0


class Pods:
    """Plays the kubelet of some pods."""

    def __init__(self, kube) -> None:
        self._kube = kube
        self._numbers = itertools.count(1)

    async def make(self, *containers: str, ready: bool = True) -> str:
        name = f"pod-{next(self._numbers)}"
        spec = {"nodeName": "node-1", "containers": [{"name": container, "image": "none"} for container in containers or ("main",)]}
        await self._kube.call("POST", self._kube.path("v1", "pods"), {"metadata": {"name": name}, "spec": spec})
        await self.run(name, ready=ready)
        return name

    async def run(self, name: str, *, ready: bool = True) -> None:
        """A new container in every place, as after a crash."""
        path = self._kube.path("v1", "pods", name)
        containers = (await self._kube.call("GET", path))["spec"]["containers"]
        statuses = [{"name": c["name"], "ready": ready, "restartCount": 0, "image": "", "imageID": "", "containerID": f"test://{next(self._numbers)}",
                     "state": {"running": {}}} for c in containers]
        await self._status(name, {"phase": "Running", "containerStatuses": statuses})
        await self.ready(name, ready)

    async def ready(self, name: str, value: bool) -> None:
        await self._status(name, {"conditions": [{"type": "Ready", "status": str(value)}]})

    async def delete(self, name: str, **options) -> None:
        await self._kube.call("DELETE", self._kube.path("v1", "pods", name), options or None)

    async def _status(self, name: str, status) -> None:
        await self._kube.call("PATCH", self._kube.path("v1", "pods", name, "status"), {"status": status}, content_type=MERGE_PATCH)


@pytest.fixture
def pods(kube):
    return Pods(kube)


@pytest.fixture
def store(api_server, kube):
    config = api_server.kubeconfig(namespace=kube.namespace)
    return lambda pod="", **options: KubernetesDiscovery(config, timeout=5.0, pod=pod, **options)


async def news(changes):
    async with asyncio.timeout(GUARD):
        while (change := await anext(changes)) == Synced():
            pass
        return change


class TestWithTheLifeOfContainers(DiscoveryContract):
    """Each store in a pod of its own; a process that is killed is a container that is started anew."""

    backlog = 200

    @pytest.fixture
    async def connect(self, api_server, kube, pods):
        config, names = api_server.kubeconfig(namespace=kube.namespace), iter([await pods.make() for _ in range(3)])
        self.pods, self.dying = pods, set()
        return lambda: KubernetesDiscovery(config, timeout=5.0, pod=next(names), backlog=self.backlog)

    def abandon(self, lease):
        task = asyncio.ensure_future(self.pods.run(lease.claim.pod))
        self.dying.add(task)


async def test_records_of_a_pod_are_seen_while_it_is_ready(pods, store) -> None:
    name = await pods.make(ready=False)
    async with store() as outside, store(name) as inside, outside.watch("k/") as changes, inside.watch("k/") as own:
        lease = await inside.lease()
        await inside.put("k/1", b"v", lease)
        assert await news(own) == Put("k/1", b"v", lease.id), "a pod sees itself: its readiness may depend on what it sees"
        assert await inside.get("k/1") == b"v"
        assert await outside.get("k/1") is None
        assert await outside.items("k/") == {}
        await pods.ready(name, True)
        assert await news(changes) == Put("k/1", b"v", lease.id)
        assert await outside.get("k/1") == b"v"
        await pods.ready(name, False)
        assert await news(changes) == Delete("k/1")
        assert await outside.items("k/") == {}
        await pods.ready(name, True)
        assert await news(changes) == Put("k/1", b"v", lease.id)
        assert not lease.lost.is_set(), "a pod that was not ready for a while is still the same"


async def test_a_pod_that_is_told_to_end_is_not_seen_while_it_drains(pods, store) -> None:
    name = await pods.make()
    async with store() as outside, store(name) as inside, outside.watch("k/") as changes:
        lease = await inside.lease()
        await inside.put("k/1", b"v", lease)
        assert await news(changes) == Put("k/1", b"v", lease.id)
        await pods.delete(name, gracePeriodSeconds=30)
        assert await news(changes) == Delete("k/1")
        assert await inside.get("k/1") == b"v"
        await inside.put("k/2", b"still served", lease)
        await pods.delete(name, gracePeriodSeconds=0)
        async with asyncio.timeout(GUARD):
            await lease.lost.wait()
        with pytest.raises(LeaseLost):
            await inside.put("k/1", b"late", lease)
        with pytest.raises(StoreUnavailable, match="there is no pod"):
            await inside.lease()


async def test_a_container_that_starts_anew_ends_the_leases_of_the_one_before(pods, store, kube) -> None:
    name = await pods.make("main", "sidecar")
    async with store() as outside, outside.watch("k/") as changes:
        before = store(name, container="main")
        await before.__aenter__()
        lease = await before.lease()
        await before.put("k/1", b"before", lease)
        assert await news(changes) == Put("k/1", b"before", lease.id)
        await pods.run(name)
        assert await news(changes) == Delete("k/1")
        async with asyncio.timeout(GUARD):
            await lease.lost.wait()
        async with store(name, container="main") as after:
            fresh = await after.lease()
            await after.put("k/1", b"after", fresh)
            assert await news(changes) == Put("k/1", b"after", fresh.id)
            with pytest.raises(LeaseLost):
                await before.put("k/1", b"late", lease)
            assert await outside.get("k/1") == b"after"
        await before.__aexit__()


async def test_which_of_several_containers_this_is_must_be_said(pods, store, monkeypatch) -> None:
    name = await pods.make("main", "sidecar")
    async with store(name) as unsaid:
        with pytest.raises(ConfigError, match="(?s)main, sidecar.*DYNAMO_CONTAINER"):
            await unsaid.lease()
        monkeypatch.setenv("DYNAMO_CONTAINER", "sidecar")
        assert await unsaid.lease()


async def test_a_pod_that_the_selector_leaves_out_keeps_its_lease_and_is_told(pods, store, caplog) -> None:
    name = await pods.make()
    async with store(pod_selector="app=else") as outside, store(name) as inside:
        lease = await inside.lease()
        await inside.put("k/1", b"v", lease)
        async with asyncio.timeout(GUARD):
            while not any("check `pod_selector`" in record.message for record in caplog.records):
                await asyncio.sleep(0.1)
        assert not lease.lost.is_set()
        assert await inside.get("k/1") == b"v"
        assert await outside.items("k/") == {}
