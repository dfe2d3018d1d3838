"""Each built-in request plane passes the kit."""

import pytest
import uvloop

from dynamo_core.contracts.transport import RequestPlaneContract
from dynamo_core.transport.http import HttpPlane
from dynamo_core.transport.inprocess import InProcessPlane
from dynamo_core.transport.tcp import TcpPlane


class TestTcp(RequestPlaneContract):
    held_outputs = 1024

    @pytest.fixture
    async def plane(self) -> TcpPlane:
        return TcpPlane()


class TestTcpOnUvloop(TestTcp):
    loop_factory = uvloop.new_event_loop


class TestInProcess(RequestPlaneContract):
    listens = False
    held_outputs = 1024

    @pytest.fixture
    async def plane(self) -> InProcessPlane:
        return InProcessPlane()


class TestHttp(RequestPlaneContract):
    @pytest.fixture
    async def plane(self) -> HttpPlane:
        return HttpPlane()
