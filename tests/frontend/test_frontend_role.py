"""The frontend role as a whole, with a worker beside it in the same process: what plugins add, and how it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import types
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import attrs
import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route

from dynamo_core.config.schema import Config, Frontend, Use
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.context import Context
from dynamo_core.discovery.memory import MemoryDiscovery
from dynamo_core.errors import ConfigError, RequestError
from dynamo_core.frontend.role import serve_frontend
from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Component, Plugin, Plugins
from dynamo_core.runtime.worker_role import serve_worker
from dynamo_core.types import Request

_names = itertools.count()


@attrs.frozen
class Hello:
    greeting: str = "hello"

    def routes(self, catalog: Any) -> Sequence[BaseRoute]:
        async def hello(request: Any) -> PlainTextResponse:
            return PlainTextResponse(f"{self.greeting}, {', '.join(model.name for model in catalog.models())}")

        async def refuse(request: Any) -> PlainTextResponse:
            raise RequestError("not like this", param="x")

        return [Route("/acme/hello", hello), Route("/acme/refuse", refuse)]


@attrs.frozen
class Stamp:
    value: str = "1"

    def wrap(self, app: Any) -> Any:
        async def stamped(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-stamp", self.value.encode())]
                await send(message)

            await app(scope, receive, sending)

        return stamped


@attrs.frozen
class NoShouting:
    async def around_request(self, request: Request, context: Context, next: Any) -> AsyncIterator[Any]:
        if ord("!") in request.token_ids:
            raise RequestError("no shouting here", param="prompt")
        async for deltas in next(request):
            yield deltas


@pytest.fixture
def plugins() -> Plugins:
    module = types.ModuleType("acme_frontend")
    plugins = Plugins.load()
    components = dict(plugins.components)
    for kind, name, target in (("routes", "hello", Hello), ("middleware", "stamp", Stamp), ("preprocessor", "no-shouting", NoShouting)):
        setattr(module, target.__name__, target)
        components[kind, name] = Component(kind, name, f"acme_frontend:{target.__name__}", Plugin("acme"))
    sys.modules["acme_frontend"] = module
    plugins.components = components
    return plugins


@contextlib.asynccontextmanager
async def running(plugins: Plugins, *, delay: float = 0.0, **config: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, asyncio.Event, asyncio.Task[int]]]:
    name = f"role-{next(_names)}"
    planes = {"discovery": Use("memory", {"name": name}), "request_plane": Use("in-process"), "event_plane": Use("in-process", {"name": name})}
    whole = Config(**planes, **({"frontend": Frontend(port=0)} | config))
    stop, leave = asyncio.Event(), asyncio.Event()
    worker = asyncio.create_task(serve_worker(whole, Settings(engine=Use("echo", {"delay": delay}), drain_timeout=0.5), plugins, stop))
    frontend = asyncio.create_task(serve_frontend(whole, plugins, leave))
    try:
        async with MemoryDiscovery(name) as discovery, asyncio.timeout(30):
            while not (urls := await discovery.items("v1/status/dynamo/frontend/")):
                if frontend.done():
                    frontend.result()
                await asyncio.sleep(0.01)
            async with httpx.AsyncClient(base_url=next(iter(urls.values())).decode(), timeout=30) as client:
                while (await client.get("/ready")).status_code != 200:
                    await asyncio.sleep(0.01)
                yield client, leave, frontend
    finally:
        leave.set()
        await asyncio.wait([frontend])
        stop.set()
        await asyncio.gather(frontend, worker, return_exceptions=True)


async def test_plugins_add_routes_middleware_and_wrappers(plugins: Plugins) -> None:
    frontend = Frontend(port=0, routes=(Use("hello", {"greeting": "good day"}),), middleware=(Use("stamp"), Use("stamp", {"value": "2"})))
    async with running(plugins, frontend=frontend, around=(Use("no-shouting"),)) as (client, _, _):
        assert (await client.get("/acme/hello")).text == "good day, echo"
        refused = await client.get("/acme/refuse")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x")
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "abc", "max_tokens": 3})
        assert answer.json()["choices"][0]["text"] == "abc"
        assert answer.headers.get_list("x-stamp") == ["2", "1"], "the first middleware is outermost"
        assert answer.headers["x-dynamo-decision"]
        for stream in (False, True):
            shouted = await client.post("/v1/completions", json={"model": "echo", "prompt": "abc!", "max_tokens": 3, "stream": stream})
            assert (shouted.status_code, shouted.json()["error"]["message"]) == (400, "no shouting here")


async def test_plugins_hear_of_every_finished_request(plugins: Plugins) -> None:
    heard: list[dict[str, Any]] = []

    class Listener:
        @hookimpl
        def dynamo_request_finished(self, request_id: str, model: str, status: int, usage: dict[str, int], seconds: float) -> None:
            heard.append({"id": request_id, "model": model, "status": status, "usage": usage, "seconds": seconds})

    plugins.manager.register(Listener(), name="acme-listener")
    async with running(plugins) as (client, _, _):
        await client.post("/v1/completions", json={"model": "echo", "prompt": "abc", "max_tokens": 3}, headers={"x-request-id": "one"})
        await client.post("/v1/completions", json={"model": "nobody", "prompt": "abc"}, headers={"x-request-id": "two"})
    assert [(h["id"], h["model"], h["status"]) for h in heard] == [("one", "echo", 200), ("two", "", 404)]
    assert heard[0]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0}
    assert heard[0]["seconds"] > 0


async def test_a_frontend_that_leaves_says_so_and_finishes_its_streams(plugins: Plugins) -> None:
    async with running(plugins, delay=0.01) as (client, leave, frontend), client.stream(
        "POST", "/v1/completions", json={"model": "echo", "prompt": "x" * 60, "max_tokens": 60, "stream": True}
    ) as response:
        lines = response.aiter_lines()
        await anext(lines)
        leave.set()
        rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert await frontend == 0
        with pytest.raises(httpx.ConnectError):
            await client.get("/live")


async def test_an_address_that_is_taken_is_a_configuration_error(plugins: Plugins) -> None:
    async with running(plugins) as (client, _, _):
        port = client.base_url.port
        with pytest.raises(ConfigError, match="Address already in use"):
            async with running(plugins, frontend=Frontend(port=port or 0)):
                pass
