"""The Kubernetes store keeps the discovery contract against a real API server, with heartbeats and with the life of pods."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from dynamo_core.contracts import DiscoveryContract
from dynamo_core.testing.proxy import Proxy
from dynamo_kubernetes.discovery import KubernetesDiscovery

pytestmark = pytest.mark.slow


class TestWithHeartbeats(DiscoveryContract):
    """Of processes outside of the cluster."""

    ttl = 2.0  # of whole seconds, the shortest that a busy machine keeps alive
    backlog = 200
    pod = ""

    @pytest.fixture
    async def proxy(self, api_server):
        async with Proxy("127.0.0.1", api_server.port) as proxy:
            self.proxy = proxy
            yield proxy

    @pytest.fixture
    def connect(self, api_server, kube, proxy):
        config = api_server.kubeconfig(port=proxy.port, namespace=kube.namespace)
        return lambda: KubernetesDiscovery(config, timeout=5.0, pod="", backlog=self.backlog)

    @asynccontextmanager
    async def outage(self):
        self.proxy.refusing = True
        self.proxy.cut()
        yield
        self.proxy.refusing = False
