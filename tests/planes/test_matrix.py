"""Any store with any request plane and any event plane serves the same end-to-end test, in processes of its own."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

_numbers = itertools.count()
STORES = ("file", "etcd", "nats")
REQUEST_PLANES = ("tcp", "http", "nats")
EVENT_PLANES = ("zmq", "nats")


@pytest.mark.slow
@pytest.mark.parametrize("events", EVENT_PLANES)
@pytest.mark.parametrize("requests", REQUEST_PLANES)
@pytest.mark.parametrize("store", STORES)
async def test_any_store_and_planes_serve_answers_and_survive_a_killed_worker(stack, load_on, tmp_path, etcd, nats, store, requests, events) -> None:
    prefix = f"matrix-{next(_numbers)}"
    options = {
        "file": {"use": "file", "path": str(tmp_path / "discovery")},
        "etcd": {"use": "etcd", "endpoints": etcd.endpoints, "prefix": f"{prefix}/"},
        "nats": {"use": "nats", "servers": nats.servers, "prefix": prefix},
    }
    network = {"use": "nats", "servers": nats.servers, "prefix": prefix}
    request_plane = network if requests == "nats" else {"use": requests}
    event_plane = network if events == "nats" else {"use": events}
    async with stack(options[store], request_plane, event_plane, lease_ttl=3.0) as running:
        load = load_on(running.url)
        async with load.under_way():
            await load.until_done(12)
            os.kill(running.children("backend")[0].process.pid, signal.SIGKILL)
            await load.until_done(18)
        assert dict(load.failures) == {}
        assert [line for line in running.said if "Traceback" in line] == []
