"""`dynamo router` as its users have it: a process before processes, asked over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import attrs
import httpx
import msgspec
import pytest

from dynamo_core.config import load
from dynamo_core.context import Context
from dynamo_core.errors import RequestError
from dynamo_core.plugins import Plugins
from dynamo_core.runtime import names
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance, Output, Request, Stops

STACK = """
request_plane = "{plane}"

[discovery]
use = "file"
path = "{folder}/discovery"

[event_plane]
use = "zmq"

[router]
use = "kv-plus"

[[workers]]
engine = {{ use = "sim", speedup = 0, block_size = 16, total_blocks = 256, context_length = 2048 }}
drain_timeout = 5
"""
WORKERS = 3


@attrs.define
class Site:
    path: Path
    url: str
    http: httpx.AsyncClient
    processes: dict[str, asyncio.subprocess.Process]

    async def start(self, name: str, *words: str) -> None:
        with (self.path.parent / f"{name}.log").open("wb") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dynamo_core.cli", *words, stdout=log, stderr=log, start_new_session=True)

    async def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        if process.returncode is None:
            process.send_signal(how)
        try:
            async with asyncio.timeout(30):
                return await process.wait()
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    async def workers(self, count: int) -> None:
        """Until the router follows the caches of so many, and of no others."""
        async with asyncio.timeout(90):
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    rows = [row for rows in (await self.http.get("/load")).json().values() for row in rows]
                    if len(rows) == count and all(row["proven"] and row["facts"]["kv.index_state"] == "events" for row in rows):
                        return
                await asyncio.sleep(0.1)


@pytest.fixture(params=["tcp", "http"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Site]:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.format(folder=tmp_path, plane=request.param))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        site = Site(path, url, http, {})
        try:
            for i in range(WORKERS):
                await site.start(f"worker-{i}", "worker", str(path))
            await site.start("router", "router", str(path), "--port", str(port))
            await site.workers(WORKERS)
            yield site
        except BaseException:
            print((tmp_path / "router.log").read_text()[-4000:])
            raise
        finally:
            codes = [await site.end(name) for name in list(site.processes)]
        assert codes == [0] * len(codes)


async def the_router(runtime: Runtime) -> Instance:
    """Its `generate`, as it stands in discovery."""
    prefix = names.instances(runtime.config.namespace)
    async with asyncio.timeout(10):
        while True:
            found = [msgspec.json.decode(value, type=Instance) for value in (await runtime.discovery.items(prefix)).values()]
            for instance in found:
                if (instance.component, instance.endpoint) == ("router", "generate"):
                    return instance
            await asyncio.sleep(0.05)


def tokens(lines: str) -> list[int]:
    return [token for line in lines.splitlines() for token in msgspec.json.decode(line)["token_ids"]]


@pytest.mark.slow
async def test_a_router_process_answers_over_http_and_over_the_request_plane(site: Site) -> None:
    http, prompt = site.http, [5 + i % 190 for i in range(200)]
    assert (await http.get("/health")).json() == {"ready": True, "missing": None, "problems": {}}

    body = {"id": "r1", "model": "sim", "token_ids": prompt, "stops": {"max_tokens": 6}}
    assert len(tokens((await http.post("/generate", json=body)).text)) == 6
    await asyncio.sleep(0.3)  # for the news of it
    best = (await http.post("/best_worker", json={"token_ids": prompt})).json()
    scores = (await http.post("/overlap_scores", json={"token_ids": prompt, "model": "sim"})).json()
    held = {worker["instance"]: worker["device"] for worker in scores["workers"]}
    assert sorted(held.values()) == [0, 0, 192]
    assert held[best["worker"]["instance"]] == best["overlap_tokens"] == 192
    again = (await http.post("/generate", json={**body, "id": "r2"})).text
    assert msgspec.json.decode(again.splitlines()[0])["cached_tokens"] == 192

    dump = (await http.get("/dump")).json()
    assert dump["models"]["sim"]
    assert str(prompt)[1:40] not in str(dump)
    assert (await http.post("/best_worker", json={"token_ids": prompt, "model": "nobody"})).status_code == 404

    config = load(site.path, plugins=(plugins := Plugins.load()))
    async with Runtime.open(config, plugins) as runtime:
        router = await the_router(runtime)

        async def ask(endpoint: str, question: object) -> Any:
            path = f"{router.namespace}.router.{endpoint}"
            (answer,) = await runtime.channels.call(router.address, path, msgspec.msgpack.encode(question), Context("q"), timeout=20.0)
            assert isinstance(answer, bytes)
            return msgspec.msgpack.decode(answer)

        assert await ask("overlap_scores", {"token_ids": prompt}) == scores
        assert (await ask("best_worker", {"token_ids": prompt}))["worker"]["instance"] == best["worker"]["instance"]
        assert len(next(iter((await ask("load", {})).values()))) == WORKERS
        assert (await ask("dump", {}))["models"]["sim"]
        with pytest.raises(RequestError, match="this is no question"):
            await ask("overlap_scores", {"prompt": "?"})
        request = Request(id="r3", model="sim", token_ids=prompt, stops=Stops(max_tokens=6))
        stream = await runtime.channels.open(router.address, f"{router.namespace}.router.generate", msgspec.msgpack.encode(request), Context("r3"))
        outputs: list[Output] = []
        while items := await stream.read():
            outputs += [item for item in items if isinstance(item, Output)]
        assert sum(len(output.token_ids) for output in outputs) == 6
        assert next(o.cached_tokens for o in outputs if o.cached_tokens is not None) == 192

    # The stack is read again; a second router on the port says what is wrong.
    about = site.path.read_text()
    for use, generation in (("no-such-policy", 1), ("round-robin", 2)):
        site.path.write_text(about.replace('"kv-plus"', f'"{use}"'))
        site.processes["router"].send_signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while f"no installed plugin provides policy '{use}'" not in (log := (site.path.parent / "router.log").read_text()) and "configuration 2" not in log:
                await asyncio.sleep(0.1)
        assert (await http.get("/dump")).json()["router"]["generation"] == generation
    site.path.write_text(about)
    await site.start("second", "router", str(site.path), "--port", site.url.rsplit(":", 1)[1])
    assert await site.processes.pop("second").wait() == 2
    log = (site.path.parent / "second.log").read_text()
    assert "cannot listen on 127.0.0.1" in log
    assert "Traceback" not in log
    site.processes["router"].send_signal(signal.SIGHUP)
    await site.workers(WORKERS)

    # A worker dies without a word: the router does without it, and follows its successor.
    assert await site.end("worker-1", signal.SIGKILL) == -signal.SIGKILL
    assert len(tokens((await http.post("/generate", json={**body, "id": "r4"})).text)) == 6
    await site.workers(WORKERS - 1)
    await site.start("worker-3", "worker", str(site.path))
    await site.workers(WORKERS)
