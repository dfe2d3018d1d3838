"""A gateway of a few lines before real processes: it selects, streams from the worker itself, says how it goes, and may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import attrs
import httpx
import msgspec
import pytest

from dynamo_core.config import load
from dynamo_core.context import Context
from dynamo_core.plugins import Plugins
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Output, Request, Stops

STACK = """
[discovery]
use = "file"
path = "{folder}/discovery"

[event_plane]
use = "zmq"

[router]
use = "kv-plus"

[[workers]]
engine = {{ use = "sim", speedup = 1, block_size = 16, total_blocks = 512, context_length = 4096 }}
drain_timeout = 2
"""
LOAD = ("bookings.in_flight", "bookings.prefill_tokens", "bookings.blocks", "kv.active_blocks", "engine.decoding", "engine.context")
FORGET = 8

VANISHING = """
import sys, time, httpx
for i in range(3):
    httpx.post(sys.argv[1] + "/select", json={"token_ids": [9] * 100, "request_id": f"lost-{i}"}).raise_for_status()
    httpx.post(sys.argv[1] + f"/requests/lost-{i}", json={"tokens": 30}).raise_for_status()
print("selected", flush=True)
time.sleep(1000)
"""


@attrs.define
class Site:
    folder: Path
    processes: list[asyncio.subprocess.Process] = attrs.field(factory=list)

    async def start(self, *words: str, python: bool = False) -> asyncio.subprocess.Process:
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            command = ("-c", *words) if python else ("-m", "dynamo_core.cli", *words)
            process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=log, stderr=log, start_new_session=True)
        self.processes.append(process)
        return process

    async def router(self, *words: str) -> httpx.AsyncClient:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        await self.start("router", str(self.folder / "stack.toml"), "--port", str(port), *words)
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30.0)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncGenerator[Site]:
    (tmp_path / "stack.toml").write_text(STACK.format(folder=tmp_path))
    site = Site(tmp_path)
    try:
        yield site
    except BaseException:
        for i in range(len(site.processes)):
            print(i, (tmp_path / f"{i}.log").read_text()[-2000:])
        raise
    finally:
        for process in site.processes:
            if process.returncode is None:
                process.terminate()
        try:
            async with asyncio.timeout(20):
                await asyncio.gather(*(process.wait() for process in site.processes))
        finally:
            for process in site.processes:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)


async def load_at(router: httpx.AsyncClient) -> dict[str, float] | None:
    """What is on all workers together, without what is nothing; `None` until both of them serve."""
    with contextlib.suppress(httpx.HTTPError):
        rows = [row for rows in (await router.get("/load")).json().values() for row in rows]
        if len(rows) == 2 and all(row["proven"] for row in rows):
            return {name: total for name in LOAD if (total := sum(row["facts"][name] for row in rows))}
    return None


async def until(router: httpx.AsyncClient, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    async with asyncio.timeout(60):
        while (load := await load_at(router)) is None or not condition(load):
            await asyncio.sleep(0.05)
    return load


async def gateway(router: httpx.AsyncClient, runtime: Runtime, id: str, prompt: list[int], tokens: int, may_end: asyncio.Event) -> int:
    """One request of a client. Returns how many tokens came."""
    worker = (await router.post("/select", json={"request_id": id, "token_ids": prompt})).raise_for_status().json()["worker"]
    request = Request(id=id, model="sim", token_ids=prompt, stops=Stops(max_tokens=tokens))
    stream = await runtime.channels.open(worker["address"], f"{runtime.config.namespace}.backend.generate", msgspec.msgpack.encode(request), Context(id))
    seen, told = 0, 0
    while items := await stream.read():
        outputs = [item for item in items if isinstance(item, Output)]
        cached = next((output.cached_tokens for output in outputs if output.cached_tokens is not None), None)
        seen += sum(len(output.token_ids) for output in outputs)
        if not told or seen - told >= 16:
            told = seen
            (await router.post(f"/requests/{id}", json={"tokens": seen, "cached_tokens": cached})).raise_for_status()
    await may_end.wait()
    (await router.delete(f"/requests/{id}")).raise_for_status()
    return seen


@pytest.mark.slow
async def test_a_gateway_sends_by_itself_and_two_routers_know_its_load_until_it_ends_or_is_killed(site: Site) -> None:
    stack = site.folder / "stack.toml"
    for _ in range(2):
        await site.start("worker", str(stack))
    async with await site.router("--forget-after", str(FORGET)) as one, await site.router("--component", "second") as other:
        for router in (one, other):
            await until(router, lambda load: not load)
        config = load(stack, plugins=(plugins := Plugins.load()))
        async with Runtime.open(config, plugins) as runtime:
            prompts = [[5 + (i * 7 + k) % 190 for k in range(200)] for i in range(4)]
            counted = asyncio.Event()
            clients = [asyncio.create_task(gateway(one, runtime, f"r{i}", prompt, 200, counted)) for i, prompt in enumerate(prompts)]
            for router in (one, other):
                rising = await until(router, lambda load: load.get("bookings.in_flight") == 4 and load.get("engine.decoding") == 4)
                assert "bookings.prefill_tokens" not in rising
                assert rising["bookings.blocks"] >= 4 * 13
                assert rising["engine.context"] > 4 * 200
            counted.set()
            assert await asyncio.gather(*clients) == [200] * 4
            for router in (one, other):
                await until(router, lambda load: not load)

            # Whose blocks a worker holds is known as ever, and told beside what it had.
            assert await gateway(one, runtime, "again", prompts[0], 20, counted) == 20
            record = (await one.get("/debug/decisions/again")).raise_for_status().json()
            assert (record["overlap_tokens"], record["cached_tokens"], record["outcome"]) == (192, 192, "done")
            async with asyncio.timeout(60):
                explain = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "dynamo_core.cli", "explain", "again", "--url", str(one.base_url), stdout=asyncio.subprocess.PIPE)
                text = (await explain.communicate())[0].decode()
            assert "192 tokens predicted, 192 found" in text

        dying = await site.start(VANISHING, str(one.base_url).rstrip("/"), python=True)
        for router in (one, other):
            await until(router, lambda load: load.get("bookings.in_flight") == 3 and load.get("engine.decoding") == 3)
        dying.kill()
        for router in (one, other):
            await until(router, lambda load: not load)
        metrics = (await one.get("/metrics")).text
        assert 'dynamo_router_reservations_ended_total{model="sim",outcome="expired"} 3.0' in metrics
        assert 'dynamo_router_reservations_ended_total{model="sim",outcome="done"} 5.0' in metrics
        assert (await one.post("/requests/lost-0")).status_code == 404
        assert "3 selected requests were not heard of for 8 s" in (site.folder / "2.log").read_text()
