"""The directory store keeps the contract; corrupt files, full disks and vanished directories are named and survived."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from dynamo_core.contracts.discovery import DiscoveryContract
from dynamo_core.discovery.file import FileDiscovery


class TestFileDiscovery(DiscoveryContract):
    ttl = 1.5

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.path = tmp_path / "discovery"

    @pytest.fixture
    def connect(self):
        return lambda: FileDiscovery(self.path, poll_interval=0.05)

    @asynccontextmanager
    async def outage(self):
        away = self.path.with_name("away")
        self.path.rename(away)
        self.path.write_text("a file where the directory should be")
        yield
        self.path.unlink()
        away.rename(self.path)
