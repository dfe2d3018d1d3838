"""The connector keeps the contract of connectors against a real API server, for each kind of thing that it scales."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from dynamo_core.contracts import ConnectorContract
from dynamo_core.testing.proxy import Proxy
from dynamo_kubernetes.connector import KubernetesConnector

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("custom_resources")]

SETS = "leaderworkerset.x-k8s.io/v1"


class Suite(ConnectorContract):
    options: ClassVar[dict[str, str]]
    controllers: ClassVar[tuple[str, ...]]

    @pytest.fixture
    async def proxy(self, api_server):
        async with Proxy("127.0.0.1", api_server.port) as proxy:
            yield proxy

    @pytest.fixture
    async def connector(self, api_server, kube, proxy, deployment, controllers):
        controllers("scheduler", "kubelet", *self.controllers)
        self.kube, self.proxy = kube, proxy
        connector = KubernetesConnector(api_server.kubeconfig(port=proxy.port, namespace=kube.namespace), timeout=5.0, stuck_after=0.3, **self.options)
        await connector.start()
        yield connector
        await connector.close()

    async def kill(self, connector, role):
        pods, _ = await self.kube.listing(self.kube.path("v1", "pods"), labelSelector=f"role={role}")
        await self.kube.call("DELETE", self.kube.path("v1", "pods", pods[0]["metadata"]["name"]), {"gracePeriodSeconds": 0})
        return True

    async def spoil(self, connector, role):
        await self.kube.call("POST", self.kube.path("v1", "configmaps"), {"metadata": {"name": "no-room"}, "data": {role: ""}})
        return True

    @asynccontextmanager
    async def outage(self, connector):
        self.proxy.refusing = True
        self.proxy.cut()
        yield
        self.proxy.refusing = False


class TestGraph(Suite):
    """Components with scaling adapters."""

    options: ClassVar = {"graph": "chat"}
    controllers: ClassVar = ("operator",)

    @pytest.fixture
    async def deployment(self, graph):
        await graph.make()
        await graph.adapt("prefill")
        await graph.adapt("decode")


class TestDeploymentAndLeaderWorkerSet(Suite):
    """One role of each kind; a replica of the set has two pods."""

    options: ClassVar = {"selector": "app=chat"}
    controllers: ClassVar = ("sets",)

    @pytest.fixture
    async def deployment(self, kube, gpu_pod):
        labels = {role: {"app": "chat", "dynamo/role": role} for role in self.roles}
        spec = {"replicas": 0, "selector": {"matchLabels": {"pods-of": "p"}}, "template": {"metadata": {"labels": {"pods-of": "p"}}, **gpu_pod}}
        await kube.call("POST", kube.path("apps/v1", "deployments"), {"metadata": {"name": "p", "labels": labels["prefill"]}, "spec": spec})
        body = {"apiVersion": SETS, "kind": "LeaderWorkerSet", "metadata": {"name": "d", "labels": labels["decode"]},
                "spec": {"replicas": 0, "leaderWorkerTemplate": {"size": 2, "workerTemplate": gpu_pod}}}
        await kube.call("POST", kube.path(SETS, "leaderworkersets"), body)

    async def test_gpus_are_counted_over_all_pods_of_a_replica(self, connector):
        assert {role: state.gpus_per_replica for role, state in (await connector.observe()).items()} == {"prefill": 2, "decode": 4}
