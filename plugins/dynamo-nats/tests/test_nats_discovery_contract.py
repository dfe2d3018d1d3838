"""The store in JetStream keeps the discovery contract, against a real server."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager

import pytest

from dynamo_core.contracts import DiscoveryContract
from dynamo_nats.discovery import NatsDiscovery

_numbers = itertools.count()


@pytest.fixture(scope="module")
def nats(nats_server):
    return nats_server()


class TestNatsDiscovery(DiscoveryContract):
    backlog = 300

    @pytest.fixture(autouse=True)
    def _server(self, nats):
        self.nats = nats
        self.prefix = f"store-{next(_numbers)}"

    @pytest.fixture
    def connect(self):
        return lambda: NatsDiscovery(servers=tuple(self.nats.servers), prefix=self.prefix, backlog=self.backlog, timeout=5.0)

    @asynccontextmanager
    async def outage(self):
        self.nats.kill()
        yield
        await asyncio.to_thread(self.nats.start)
