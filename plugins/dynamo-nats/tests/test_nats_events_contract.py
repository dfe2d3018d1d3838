"""The event plane over NATS keeps the contract, with and without JetStream, against a real server."""

from __future__ import annotations

import itertools

import pytest

from dynamo_core.contracts import EventPlaneContract
from dynamo_nats.events import NatsEvents

_numbers = itertools.count()


@pytest.fixture(scope="module")
def nats(nats_server):
    return nats_server()


class TestNatsEvents(EventPlaneContract):
    in_flight = 400

    @pytest.fixture
    def make(self, nats):
        prefix = f"kit-{next(_numbers)}"
        return lambda: NatsEvents(servers=tuple(nats.servers), prefix=prefix, receive_queue=self.backlog, send_queue=self.in_flight)


class TestDurableNatsEvents(EventPlaneContract):
    replays = 500

    @pytest.fixture
    def make(self, nats):
        prefix = f"durable-{next(_numbers)}"
        return lambda: NatsEvents(servers=tuple(nats.servers), prefix=prefix, receive_queue=self.backlog, durable=True, keep_events=self.replays)
