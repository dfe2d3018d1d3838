"""The connector keeps the contract of connectors against a real API server, for each kind of thing that it scales."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from dynamo_core.contracts import ConnectorContract
from dynamo_core.testing.proxy import Proxy
from dynamo_kubernetes.api import Kube
from dynamo_kubernetes.connector import KubernetesConnector

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("custom_resources")]

NVIDIA = "nvidia.com/v1beta1"
POD = {"spec": {"containers": [{"name": "main", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "2"}}}]}}


class Suite(ConnectorContract):
    roles = ("prefill", "decode")
    options: dict[str, str]
    controllers: tuple[str, ...]

    async def make(self, kube: Kube) -> None:
        raise NotImplementedError

    @pytest.fixture
    async def proxy(self, api_server):
        async with Proxy("127.0.0.1", api_server.port) as proxy:
            yield proxy

    @pytest.fixture
    async def connector(self, api_server, kube, proxy, controllers):
        await self.make(kube)
        controllers("scheduler", "kubelet", *self.controllers)
        self.kube, self.proxy = kube, proxy
        config = api_server.kubeconfig(port=proxy.port, namespace=kube.namespace)
        connector = KubernetesConnector(config, timeout=5.0, stuck_after=0.3, **self.options)
        await connector.start()
        yield connector
        await connector.close()

    async def pods(self, role: str) -> list[dict]:
        return (await self.kube.listing(self.kube.path("v1", "pods"), labelSelector=f"role={role}"))[0]

    async def kill(self, connector, role):
        name = (await self.pods(role))[0]["metadata"]["name"]
        await self.kube.call("DELETE", self.kube.path("v1", "pods", name), {"gracePeriodSeconds": 0})
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


class TestGraphWithAdapters(Suite):
    options = {"graph": "chat"}
    controllers = ("operator",)

    async def make(self, kube):
        await make_graph(kube)
        for component in ("prefill", "decode"):
            await make_adapter(kube, component)


class TestGraphWithoutAdapters(Suite):
    options = {"graph": "chat"}
    controllers = ("operator",)

    async def make(self, kube):
        await make_graph(kube, nodes=2)


class TestDeployments(Suite):
    options = {"selector": "app=chat"}
    controllers = ("sets",)

    async def make(self, kube):
        for role in self.roles:
            labels = {"app": "chat", "dynamo/role": role}
            spec = {"replicas": 0, "selector": {"matchLabels": {"pods-of": role}}, "template": {"metadata": {"labels": {"pods-of": role}}, **POD}}
            await kube.call("POST", kube.path("apps/v1", "deployments"), {"metadata": {"name": role, "labels": labels}, "spec": spec})


class TestLeaderWorkerSets(Suite):
    options = {"selector": "app=chat"}
    controllers = ("sets",)

    async def make(self, kube):
        for role in self.roles:
            labels = {"app": "chat", "dynamo/role": role}
            body = {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": {"name": role, "labels": labels},
                    "spec": {"replicas": 0, "leaderWorkerTemplate": {"size": 2, "workerTemplate": POD}}}
            await kube.call("POST", kube.path("leaderworkerset.x-k8s.io/v1", "leaderworkersets"), body)


async def make_graph(kube: Kube, nodes: int = 1, replicas: int = 0) -> None:
    multinode = {"multinode": {"nodeCount": nodes}} if nodes > 1 else {}
    components = [{"name": "Frontend", "type": "frontend", "replicas": 1},
                  *({"name": role, "type": role, "replicas": replicas, "podTemplate": POD, **multinode} for role in ("prefill", "decode"))]
    await kube.call("POST", kube.path(NVIDIA, "dynamographdeployments"),
                    {"apiVersion": NVIDIA, "kind": "DynamoGraphDeployment", "metadata": {"name": "chat"}, "spec": {"components": components}})


async def make_adapter(kube: Kube, component: str, replicas: int = 0) -> None:
    await kube.call("POST", kube.path(NVIDIA, "dynamographdeploymentscalingadapters"),
                    {"apiVersion": NVIDIA, "kind": "DynamoGraphDeploymentScalingAdapter", "metadata": {"name": f"chat-{component}"},
                     "spec": {"replicas": replicas, "dgdRef": {"name": "chat", "componentName": component}}})
