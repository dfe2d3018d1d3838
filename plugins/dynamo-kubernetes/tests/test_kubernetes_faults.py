"""What happens to discovery when the API server, or the way to it, does not do what it should."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from dynamo_core.discovery.contract import Delete, Put, Synced
from dynamo_core.errors import ConfigError, ConnectorUnavailable, LeaseLost, StoreUnavailable
from dynamo_core.testing.proxy import Proxy
from dynamo_kubernetes import api
from dynamo_kubernetes.access import find
from dynamo_kubernetes.api import MERGE_PATCH, Kube, Refused
from dynamo_kubernetes.connector import KubernetesConnector
from dynamo_kubernetes.discovery import KubernetesDiscovery
from dynamo_kubernetes.records import lease_name, now, read_claim, read_record, record_object
from dynamo_kubernetes.reflect import Reflection

pytestmark = pytest.mark.slow
GUARD = 40.0


@pytest.fixture
def store(api_server, kube):
    return lambda port=None, **options: KubernetesDiscovery(api_server.kubeconfig(port=port, namespace=kube.namespace), **{"timeout": 3.0, "pod": "", **options})


async def news(changes):
    async with asyncio.timeout(GUARD):
        while (change := await anext(changes)) == Synced():
            pass
        return change


@pytest.fixture
async def connector(api_server, graph, kube):
    await graph.make()
    connector = KubernetesConnector(api_server.kubeconfig(namespace=kube.namespace), graph="chat", timeout=3.0)
    await connector.start()
    yield connector
    await connector.close()


async def test_an_api_server_that_is_gone_for_longer_than_the_lease_costs_nothing(store, api_server, connector) -> None:
    async with store() as here, store() as there, there.watch("k/") as changes:
        assert await anext(changes) == Synced()
        lease = await here.lease(2.0)
        await here.put("k/1", b"v", lease)
        assert await news(changes) == Put("k/1", b"v", lease.id)
        api_server.kill()
        with pytest.raises(StoreUnavailable):
            await there.get("k/1")
        assert "does not answer" in (there.problem() or "")
        with pytest.raises(ConnectorUnavailable):
            await connector.observe()
        with pytest.raises(ConnectorUnavailable):
            await connector.scale({"decode": 1}, reason="nobody hears")
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(2.5)
        assert not waiting.done(), "an outage is not an empty store"
        await asyncio.to_thread(api_server.start)
        await asyncio.sleep(2.5)  # longer than the lease: its heartbeats must have come through
        assert not lease.lost.is_set()
        assert not waiting.done()
        await here.put("k/2", b"after", lease)
        async with asyncio.timeout(GUARD):
            assert await waiting == Put("k/2", b"after", lease.id)
        assert there.problem() is None
        await connector.scale({"decode": 1}, reason="it is back")
        assert (await connector.observe())["decode"].desired == 1


async def test_a_version_that_the_server_has_forgotten_is_read_anew(kube, api_server, monkeypatch) -> None:
    """The watch ends on time each second; then the first attempt to go on asks for a version of long ago, and the real server says 410 Gone."""
    monkeypatch.setattr(api, "_WATCH", 1)
    answers: list[int] = []

    class Forgetful(Kube):
        watches = 0

        @asynccontextmanager
        async def watch(self, path, version, **params):
            self.watches += 1
            try:
                async with super().watch(path, "1" if self.watches == 2 else version, **params) as events:
                    yield events
            except Refused as e:
                answers.append(e.code)
                raise

    told: list[tuple[object, object]] = []
    async with Forgetful(find(api_server.kubeconfig(), None, kube.namespace), 5.0) as forgetful:
        records = Reflection(forgetful, kube.path("v1", "configmaps"), "dynamo/store=s", read_record, lambda _, before, after: told.append((before, after)))
        await kube.call("POST", kube.path("v1", "configmaps"), record_object("s", "k/0", b"0", None))
        await records.fresh()
        async with asyncio.timeout(GUARD):
            number = 1
            while not answers or len(told) < number:
                if len(told) == number:
                    await kube.call("POST", kube.path("v1", "configmaps"), record_object("s", f"k/{number}", b"v", None))
                    number += 1
                await asyncio.sleep(0.05)
        await records.close()
    assert answers[0] == 410
    assert [after.key for _, after in told if isinstance(after, Put)] == [f"k/{i}" for i in range(number)]
    assert all(before is None for before, _ in told), "nothing was told twice"


async def test_a_server_that_swallows_everything_is_left_within_the_timeout(store, api_server) -> None:
    async with Proxy("127.0.0.1", api_server.port) as proxy, store(proxy.port, timeout=1.0) as here:
        await here.put("k/1", b"v")
        proxy.blackhole()
        async with asyncio.timeout(GUARD):
            with pytest.raises(StoreUnavailable, match="no answer within 1 s"):
                await here.put("k/1", b"w")
        proxy.heal()
        await here.put("k/1", b"x")
        assert await here.get("k/1") == b"x"


async def test_what_others_keep_in_the_namespace_is_left_alone(store, kube) -> None:
    async with store() as here, store(store="other") as other, here.watch("") as changes:
        await kube.call("POST", kube.path("v1", "configmaps"), {"metadata": {"name": "settings"}, "data": {"a": "b"}})
        forged = record_object("dynamo", "k/real", b"v", None)
        forged["metadata"]["annotations"] = {"dynamo/key": "k/another"}
        await kube.call("POST", kube.path("v1", "configmaps"), forged)
        await other.put("k/1", b"theirs")
        await here.put("k/1", b"ours")
        assert await news(changes) == Put("k/1", b"ours")
        assert await here.items("") == {"k/1": b"ours"}
        assert await other.items("") == {"k/1": b"theirs"}
        await other.delete("k/1")
        await here.delete("k/1")
        assert await news(changes) == Delete("k/1")
        assert (await kube.call("GET", kube.path("v1", "configmaps", "settings")))["data"] == {"a": "b"}


async def test_whoever_may_not_read_is_told_what_to_bind(api_server, kube) -> None:
    with pytest.raises(ConfigError, match="(?s)refuses us.*cannot list resource.*bind the role"):
        async with KubernetesDiscovery(api_server.kubeconfig("nobody-token", namespace=kube.namespace), pod=""):
            pass
    with pytest.raises(ConfigError, match=r"(?s)refuses us.*Unauthorized.*check the credentials"):
        async with KubernetesDiscovery(api_server.kubeconfig("no-such-token", namespace=kube.namespace), pod=""):
            pass


async def test_a_namespace_that_does_not_exist_is_named(api_server, kube) -> None:
    async with KubernetesDiscovery(api_server.kubeconfig(namespace="no-such"), pod="") as here:
        with pytest.raises(StoreUnavailable, match='"no-such" not found'):
            await here.put("k/1", b"v")
        with pytest.raises(StoreUnavailable, match='"no-such" not found'):
            await here.lease()


# ------------------------------------------------------------------ races, each at its worst moment


async def test_a_lease_that_was_renewed_a_moment_ago_is_not_ended(store, kube) -> None:
    async with store() as here, store() as there:
        lease = await here.lease(30.0)
        await here.put("k/1", b"v", lease)
        path = f"{here._mirror.paths[1]}/{lease_name(lease.id)}"
        stale = read_claim(await kube.call("GET", path))
        await kube.call("PATCH", path, {"spec": {"renewTime": now()}}, content_type=MERGE_PATCH)
        await there._mirror.end(stale)
        assert await there.get("k/1") == b"v"
        await there._mirror.end(read_claim(await kube.call("GET", path)))
        assert await there.get("k/1") is None
        async with asyncio.timeout(GUARD):
            await lease.lost.wait()


async def test_sweeping_after_the_dead_leaves_what_a_successor_wrote_meanwhile(store) -> None:
    async with store() as here, store() as there:
        dead, alive = await here.lease(30.0), await there.lease(30.0)
        await here.put("k/1", b"dead", dead)
        await here.put("k/2", b"dead", dead)
        kube = here._kube
        listing = kube.listing

        async def list_and_be_overtaken(path, **params):
            found = await listing(path, **params)
            await there.put("k/1", b"alive", alive)
            return found

        kube.listing = list_and_be_overtaken
        await dead.revoke()
        kube.listing = listing
        assert await there.items("k/") == {"k/1": b"alive"}


async def test_what_a_dead_owner_still_has_on_its_way_does_not_replace_its_successors_record(store) -> None:
    async with store() as here, store() as there:
        old, new = await here.lease(30.0), await there.lease(30.0)
        await here.put("k/1", b"old", old)
        kube, overtaken = here._kube, []
        call = kube.call

        async def write_too_late(method, path, body=None, **options):
            if method == "PUT" and not overtaken:
                overtaken.append(True)
                await kube.call("DELETE", f"{here._mirror.paths[1]}/{lease_name(old.id)}")
                await there.put("k/1", b"new", new)
            return await call(method, path, body, **options)

        kube.call = write_too_late
        with pytest.raises(LeaseLost):
            await here.put("k/1", b"late", old)
        assert overtaken
        assert await there.get("k/1") == b"new"
