"""Two frontends and four workers as processes: what engines find in their caches is what either router predicted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import httpx
import pytest

from dynamo_core.cli.local_stack import LocalStack
from dynamo_core.config import load
from dynamo_core.plugins import Plugins

STACK = """
[discovery]
use = "file"
path = "{path}/discovery"

[event_plane]
use = "lossy"
flag = "{path}/lose"

[frontend]
port = {port}
processes = 2

[router]
scorers = [{{ use = "kv-overlap" }}, {{ use = "load", weight = 0.2 }}]

[[workers]]
count = 4
engine = {{ use = "sim", speedup = 0, block_size = 16, total_blocks = 256, context_length = 2048 }}
drain_timeout = 5
"""

LOSSY = '''
import os, random
import attrs
from dynamo_core.events.zmq import ZmqEvents
from dynamo_core.hookspecs import hookimpl

@hookimpl
def dynamo_register(registry):
    registry.event_plane("lossy", "lossy_plane:LossyEvents", summary="loses news of KV caches while a file exists")

@attrs.define(eq=False)
class LossyEvents(ZmqEvents):
    flag: str = attrs.field(kw_only=True, default="")

    async def publisher(self, topic):
        publisher = await super().publisher(topic)
        return Lossy(publisher, self.flag) if topic.endswith("/kv") else publisher

class Lossy:
    def __init__(self, publisher, flag):
        self.publisher, self.flag = publisher, flag
        self.close = publisher.close

    def publish(self, payload):
        if os.path.exists(self.flag) and random.random() < 0.5:
            return -1
        return self.publisher.publish(payload)
'''


@pytest.fixture
def lossy_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lossy_plane.py").write_text(LOSSY)
    about = tmp_path / "lossy_plane-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lossy-plane\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dynamo]\nlossy-plane = lossy_plane\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(tmp_path)


class Fleet:
    def __init__(self, stack: LocalStack, clients: list[httpx.AsyncClient]) -> None:
        self.stack, self.clients = stack, clients
        self.rng = random.Random(7)
        self.roots = [self.tokens(self.rng.randrange(60, 600)) for _ in range(8)]

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(5, 200) for _ in range(count)]

    async def ask(self) -> tuple[int, int]:
        """Tokens predicted to be cached, and tokens that were; through one of the frontends."""
        client, root = self.rng.choice(self.clients), self.rng.choice(self.roots)
        prompt = root[: self.rng.randrange(30, len(root))] + self.tokens(self.rng.randrange(1, 80))
        answer = await client.post("/v1/completions", json={"model": "sim", "prompt": prompt, "max_tokens": 4, "temperature": 0})
        assert answer.status_code == 200, answer.text
        decision = (await client.get(f"/debug/decisions/{answer.headers['x-dynamo-decision']}")).json()
        row = decision["workers"].index(decision["worker"])
        predicted = decision["columns"]["kv.overlap_tokens"]["values"][row]
        found = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (decision["overlap_tokens"], decision["cached_tokens"]) == (predicted, found)
        return predicted, found

    async def counted(self) -> tuple[float, float]:
        """Cached tokens that both frontends predicted, and those that engines found, by their metrics."""
        totals = {"predicted": 0.0, "found": 0.0}
        for line in (await self.clients[0].get("/metrics")).text.splitlines():  # each answers for both
            for kind in totals:
                if line.startswith(f"dynamo_router_{kind}_cached_tokens_total{{"):
                    totals[kind] += float(line.rsplit(" ", 1)[1])
        return totals["predicted"], totals["found"]

    async def predictions_hold(self, count: int) -> int:
        found = 0
        for _ in range(count):
            predicted, actual = await self.ask()
            assert predicted == actual
            found += actual
            await asyncio.sleep(0.2)  # For the other frontend to hear of it, also on a busy machine.
        return found

    async def ready(self, workers: int) -> None:
        """Each frontend follows the events of this many workers."""
        async with asyncio.timeout(60):
            for client in self.clients:
                while True:
                    rows = [row for rows in (await client.get("/debug/routers")).json().values() for row in rows]
                    if len([row for row in rows if row["proven"] and row["facts"]["kv.index_state"] == "events"]) == workers == len(rows):
                        break
                    await asyncio.sleep(0.1)


@pytest.fixture
async def fleet(tmp_path: Path, unused_tcp_port_factory: Callable[[], int], lossy_plane: None) -> AsyncGenerator[Fleet]:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.format(path=tmp_path, port=unused_tcp_port_factory()))
    plugins = Plugins.load()
    said: list[str] = []
    async with LocalStack.open(path, (), load(path, plugins=plugins), plugins, lambda name, line: said.append(f"{name} | {line}")) as stack, \
            contextlib.AsyncExitStack() as held:
        try:
            url = await stack.wait_ready(lambda _: None, 120.0)
            clients: dict[int, httpx.AsyncClient] = {}
            while len(clients) < 2:  # One connection stays with one process.
                client = await held.enter_async_context(httpx.AsyncClient(base_url=url, timeout=30.0, limits=httpx.Limits(max_connections=1)))
                clients.setdefault((await client.get("/debug/fleet")).json()["pid"], client)
            fleet = Fleet(stack, list(clients.values()))
            await fleet.ready(4)
            yield fleet
        finally:
            print("\n".join(said[-40:]))


@pytest.mark.slow
async def test_the_engines_hit_what_both_routers_predicted_through_loss_and_death(fleet: Fleet, tmp_path: Path) -> None:
    assert (found := await fleet.predictions_hold(60)) > 3000
    assert await fleet.counted() == (found, found)

    victim = next(child for child in fleet.stack.supervisor.children if child.name.startswith("backend"))
    assert victim.process is not None
    os.kill(victim.process.pid, signal.SIGKILL)
    await asyncio.sleep(0.5)
    await fleet.ready(4)  # Its successor has joined under another id, and the dead one is gone.
    assert await fleet.predictions_hold(40) > 1000

    (tmp_path / "lose").touch()
    for _ in range(40):
        await fleet.ask()
    (tmp_path / "lose").unlink()
    await asyncio.sleep(2.5)  # A sign of life, an answer.
    await fleet.ready(4)
    assert await fleet.predictions_hold(40) > 1000
