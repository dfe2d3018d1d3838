"""The request plane over NATS keeps the contract, against a real server."""

from __future__ import annotations

import itertools

import pytest

from dynamo_core.contracts import RequestPlaneContract
from dynamo_nats.plane import NatsPlane

_numbers = itertools.count()


@pytest.fixture(scope="module")
def nats(nats_server):
    return nats_server()


class TestNatsPlane(RequestPlaneContract):
    listens = False  # no port of its own: what strangers can do is in test_nats_strangers.py
    held_outputs = 1024

    @pytest.fixture
    async def plane(self, nats):
        return NatsPlane(servers=tuple(nats.servers), prefix=f"kit-{next(_numbers)}")
