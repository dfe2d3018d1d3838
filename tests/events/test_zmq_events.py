"""The ZeroMQ plane keeps the contract, in the clear and encrypted."""

from __future__ import annotations

import pytest
import zmq

from dynamo_core.contracts.events import EventPlaneContract
from dynamo_core.events.zmq import ZmqEvents


class TestZmqEvents(EventPlaneContract):
    @pytest.fixture
    def make(self):
        return lambda: ZmqEvents(receive_queue=self.backlog)


class TestZmqEventsWithCurve(EventPlaneContract):
    @pytest.fixture
    def make(self):
        secret = zmq.curve_keypair()[1].decode()
        return lambda: ZmqEvents(receive_queue=self.backlog, curve_secret_key=secret)
