"""Certificates of the HTTPS address that are renewed on disk count from the next connection on."""

from __future__ import annotations

import asyncio
import os
import ssl
import time

import httpx
import pytest
from both_servers import SERVERS
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Frontend, Tls
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.testing.servers import Authority


@pytest.mark.parametrize("http_server", SERVERS.values())
async def test_renewed_certificates_are_served_without_a_restart(http_server, tmp_path):
    from fake_catalog import FakeCatalog, FakeModel

    first, second = Authority(tmp_path, "first"), Authority(tmp_path, "second")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    installed = 0

    def install(authority):
        nonlocal installed
        installed += 1
        for source, target in zip(authority.issue(f"frontend{installed}"), (cert, key), strict=True):
            target.write_bytes(source.read_bytes())
            os.utime(target, (time.time(), time.time() + installed))

    install(first)
    stop, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    app = create_app(Frontend(), FakeCatalog(FakeModel("m")), metrics=HttpMetrics(CollectorRegistry()))
    server = asyncio.create_task(
        http_server().serve(app, host="127.0.0.1", port=0, tls=Tls(cert, key), stop=stop, on_listening=port.set_result, drain_timeout=1.0)
    )
    url = f"https://127.0.0.1:{await port}/live"

    async def ask(authority):
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(authority.cert))) as client:
            return (await client.get(url)).status_code

    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(first.cert))) as old:
        assert (await old.get(url)).status_code == 200
        install(second)
        assert await ask(second) == 200
        with pytest.raises(httpx.ConnectError, match="(?i)certificate"):
            await ask(first)
        assert (await old.get(url)).status_code == 200, "a connection that is open goes on"
        key.write_text("half written")
        assert await ask(second) == 200, "the former certificate stays while the new one cannot be used"
    stop.set()
    await server
