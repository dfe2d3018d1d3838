"""The application with a scripted catalog, behind a real socket, by each HTTP server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).parent))

from both_servers import SERVERS
from fake_catalog import FakeCatalog, FakeModel

from dynamo_core.config.schema import Frontend
from dynamo_core.frontend.app import App, create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.frontend.servers.hypercorn import HypercornServer


@attrs.define
class Site:
    """What a test holds: the running application and its scripted model."""

    app: App
    model: FakeModel
    catalog: FakeCatalog
    registry: CollectorRegistry
    port: int
    stop: asyncio.Event
    task: asyncio.Task[None]
    client: httpx.AsyncClient
    finished: list[dict[str, Any]]

    async def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": content}]} | fields)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "m", "prompt": "hi"} | fields)

    async def settled(self) -> None:
        """Until no request is in progress: the server hears of a closed connection a moment after the client closed it."""
        async with asyncio.timeout(20):
            while self.app.in_progress:
                await asyncio.sleep(0.005)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"dynamo_frontend_{name}", labels) or 0.0


@asynccontextmanager
async def running(
    server: Any = None, *, config: Frontend | None = None, model: FakeModel | None = None, drain_timeout: float = 5.0, **options: Any
) -> AsyncIterator[Site]:
    model = model or FakeModel("m", aliases=("org/name/with-slashes",))
    catalog = FakeCatalog(model)
    registry = CollectorRegistry()
    finished: list[dict[str, Any]] = []
    app = create_app(config or Frontend(), catalog, metrics=HttpMetrics(registry), observers=[lambda **about: finished.append(about)], **options)
    stop = asyncio.Event()
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = (server or HypercornServer()).serve(
        app, host="127.0.0.1", port=0, tls=None, stop=stop, on_listening=port.set_result, drain_timeout=drain_timeout, reuse_port=False
    )
    task = asyncio.create_task(serving)
    await asyncio.wait((task, port), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    # Without TLS there is nothing to verify, and reading the certificates of the world takes longer than most tests.
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port.result()}", verify=False, timeout=30) as client:
        yield Site(app, model, catalog, registry, port.result(), stop, task, client, finished)
    stop.set()
    async with asyncio.timeout(30):
        await task


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    """Behind hypercorn."""
    async with running() as site:
        yield site


@pytest.fixture(params=sorted(SERVERS))
async def each(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Behind each server in turn."""
    async with running(SERVERS[request.param]()) as site:
        yield site


@pytest.fixture(params=sorted(SERVERS))
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`async with run(config=..., model=...) as site`, by each server in turn."""
    return lambda **options: running(SERVERS[request.param](), **options)


@pytest.fixture
def start() -> Callable[..., Any]:
    """`async with start(config=..., model=...) as site`, behind hypercorn."""
    return running
