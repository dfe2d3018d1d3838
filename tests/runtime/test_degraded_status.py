"""The status endpoint tells what stops a role from what makes it worse."""

from __future__ import annotations

import os

import httpx
import pytest
from prometheus_client import CollectorRegistry

from dynamo_core.runtime.status import status_app


@pytest.mark.parametrize(("problems", "lesser", "code", "status"), [
    ({}, {}, 200, "ready"),
    ({}, {"pool slow": "gone"}, 200, "degraded"),
    ({"lease": "lost"}, {"pool slow": "gone"}, 503, "unready"),
])
async def test_a_degraded_engine_is_healthy_enough_to_serve(problems, lesser, code, status) -> None:
    app = status_app("worker", lambda: problems, CollectorRegistry(), degraded=lambda: lesser)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://worker") as client:
        answer = await client.get("/health")
    assert answer.status_code == code
    assert answer.json() == {"status": status, "role": "worker", "pid": os.getpid(), "problems": {**lesser, **problems}}
