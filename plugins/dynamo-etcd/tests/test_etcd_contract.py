"""The etcd store keeps the discovery contract, against a real server."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from dynamo_core.contracts import DiscoveryContract
from dynamo_etcd.store import EtcdDiscovery

_numbers = itertools.count()


@pytest.fixture(scope="module")
def etcd(etcd_server):
    return etcd_server(options=("--heartbeat-interval", "20", "--election-timeout", "200"))  # which allows leases of a second


class TestEtcd(DiscoveryContract):
    backlog = 300

    @pytest.fixture(autouse=True)
    def _server(self, etcd):
        self.etcd = etcd
        self.prefix = f"kit-{next(_numbers)}/"

    @pytest.fixture
    def connect(self):
        return lambda: EtcdDiscovery(tuple(self.etcd.endpoints), self.prefix, timeout=5.0, ping_interval=0.2, backlog=self.backlog)

    @asynccontextmanager
    async def outage(self):
        self.etcd.kill()
        yield
        await asyncio.to_thread(self.etcd.start)
