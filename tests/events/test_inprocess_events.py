"""The in-process plane keeps the contract."""

from __future__ import annotations

import pytest

from dynamo_core.contracts.events import EventPlaneContract
from dynamo_core.events.inprocess import InProcessEvents


class TestInProcessEvents(EventPlaneContract):
    @pytest.fixture
    def make(self):
        return lambda: InProcessEvents(receive_queue=self.backlog)
