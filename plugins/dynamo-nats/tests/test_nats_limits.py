"""Limits that several frontends hold together: the contract of rate limiters, and what only a shared count can be asked."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from dynamo_core.config import build
from dynamo_core.config.schema import Use
from dynamo_core.contracts import RateLimiterContract
from dynamo_core.errors import ConfigError, RateLimited, StoreUnavailable
from dynamo_core.plugins import Plugins
from dynamo_core.testing.servers import free_port
from dynamo_nats.limits import NatsPerTenant

_numbers = itertools.count()


@pytest.fixture(scope="module")
def nats(nats_server):
    return nats_server()


@pytest.fixture
async def frontend(nats):
    """Makes limiters of one fleet, each as another frontend has it."""
    prefix, made = f"limits-{next(_numbers)}", list[NatsPerTenant]()

    def make(servers=None, timeout=5.0, **limits) -> NatsPerTenant:
        made.append(NatsPerTenant(servers=tuple(servers or nats.servers), prefix=prefix, timeout=timeout, **limits))
        return made[-1]

    yield make
    for limiter in made:
        await limiter.__aexit__()


async def granted(*asked) -> int:
    """How many of these requests get through, all at once."""
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [result for result in results if isinstance(result, BaseException) and not isinstance(result, RateLimited)] == []
    return sum(not isinstance(result, RateLimited) for result in results)


class TestNatsPerTenant(RateLimiterContract):
    @pytest.fixture
    def make(self, frontend):
        def limiter(*, requests=None, tokens=None, seconds=60):
            limits = {"requests": requests, "tokens": tokens}
            return frontend(**{kind: f"{amount}/{seconds} seconds" for kind, amount in limits.items() if amount is not None})

        return limiter


async def test_frontends_share_requests_and_tokens(frontend) -> None:
    one, other = (frontend(requests="5/hour", tokens="1000/hour") for _ in range(2))
    for limiter in (one, other, one, other, one):
        await limiter.admit("acme")
    for limiter in (one, other):
        with pytest.raises(RateLimited):
            await limiter.admit("acme")
    held = await one.reserve("acme", 900)
    with pytest.raises(RateLimited):
        await other.reserve("acme", 200)
    held.settle(100)
    await one.reserve("someone else", 1000)
    async with asyncio.timeout(10):
        while await granted(other.reserve("acme", 800)) == 0:  # what was given back travels
            await asyncio.sleep(0.01)


async def test_many_requests_at_many_frontends_get_exactly_the_limit(frontend) -> None:
    limiters = [frontend(requests="100/hour", tokens="5000/hour") for _ in range(4)]
    assert await granted(*(limiter.admit("acme") for _ in range(50) for limiter in limiters)) == 100
    assert await granted(*(limiter.reserve("acme", 100) for _ in range(50) for limiter in limiters)) == 50


async def test_a_limit_fills_again_at_one_rate_whoever_asks(frontend) -> None:
    limiters = [frontend(requests="10/2 seconds") for _ in range(3)]
    assert await granted(*(limiter.admit("acme") for _ in range(10) for limiter in limiters)) == 10
    started, more = asyncio.get_running_loop().time(), 0
    while (passed := asyncio.get_running_loop().time() - started) < 1.0:
        more += await granted(*(limiter.admit("acme") for limiter in limiters))
        assert more <= 5 * (passed + 0.2) + 1
    assert more >= 3


async def test_a_request_that_is_gone_before_it_is_granted_keeps_nothing(frontend) -> None:
    limiter = frontend(tokens="1000/hour")
    await limiter.reserve("acme", 1)
    for delay in (0.0, 0.0001, 0.0005, 0.001, 0.002, 0.005):
        asking = asyncio.create_task(limiter.reserve("acme", 900))
        await asyncio.sleep(delay)
        asking.cancel()
        for held in await asyncio.gather(asking, return_exceptions=True):
            if not isinstance(held, BaseException):
                held.settle(0)
    async with asyncio.timeout(10):
        while await granted(limiter.reserve("acme", 990)) == 0:
            await asyncio.sleep(0.01)


async def test_without_nats_each_frontend_counts_by_what_it_knew_and_says_so(frontend, nats_server) -> None:
    nats = nats_server()
    one, other = (frontend(nats.servers, timeout=1.0, requests="10/hour") for _ in range(2))
    for _ in range(4):
        await one.admit("acme")
    await other.admit("acme")
    assert one.problem() is None
    nats.nodes[0].pause()
    assert await granted(*(one.admit("acme") for _ in range(10))) == 6, "as many as were left when it last knew"
    assert "each frontend counts alone" in one.problem()
    assert await granted(*(other.admit("acme") for _ in range(3))) == 3
    nats.nodes[0].resume()
    async with asyncio.timeout(30):
        while one.problem() or other.problem():
            await asyncio.sleep(0.05)
    assert await granted(one.admit("acme")) == 0, "what was used meanwhile is used"
    assert await granted(other.admit("acme")) == 0


async def test_counts_that_nats_has_lost_are_those_that_frontends_know(frontend, nats_server) -> None:
    nats = nats_server()
    limiter = frontend(nats.servers, timeout=1.0, requests="10/hour")
    for _ in range(7):
        await limiter.admit("acme")
    nats.kill()
    await asyncio.to_thread(nats.start)
    assert await granted(*(limiter.admit("acme") for _ in range(10))) == 3
    async with asyncio.timeout(30):
        while limiter.problem():
            await asyncio.sleep(0.05)
    assert await granted(limiter.admit("acme")) == 0
    assert await granted(frontend(nats.servers, requests="10/hour").admit("acme")) == 0


async def test_whoever_cannot_count_is_told_at_start(nats_server) -> None:
    with pytest.raises(StoreUnavailable, match="does not answer"):
        async with NatsPerTenant(servers=("nats://127.0.0.1:9",), connect_timeout=0.5):
            pass
    with pytest.raises(ConfigError, match="JetStream"):
        async with NatsPerTenant(servers=tuple(nats_server(jetstream=False).servers)):
            pass
    with pytest.raises(ConfigError, match="600/minute"):
        build(Use("nats-per-tenant", {"requests": "lots"}), "rate_limiter", Plugins.load())


STACK = """
[discovery]
use = "file"
path = "{folder}/discovery"

[frontend]
port = 0
[frontend.rate_limiter]
use = "nats-per-tenant"
servers = ["{server}"]
prefix = "processes"
requests = "7/hour"

[[workers]]
engine = {{ use = "sim", pace_ms = 1 }}
"""


@pytest.mark.slow
async def test_two_frontend_processes_hold_one_limit(nats, tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(STACK.format(folder=tmp_path, server=nats.servers[0]))
    ports = [free_port(), free_port()]
    roles = [["worker", str(path)], *(["frontend", str(path), "--port", str(port)] for port in ports)]
    log = (tmp_path / "log").open("wb")
    processes = [await asyncio.create_subprocess_exec(sys.executable, "-m", "dynamo_core.cli", *role, stdout=log, stderr=log, start_new_session=True) for role in roles]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        async with httpx.AsyncClient(timeout=30.0) as client:
            async with asyncio.timeout(90):
                for url in urls:
                    while not await _ready(client, url):
                        await asyncio.sleep(0.1)
            body = {"model": "sim", "prompt": "hello", "max_tokens": 2}
            statuses = [(await client.post(f"{urls[i % 2]}/v1/completions", json=body)).status_code for i in range(8)]
            at_once = await asyncio.gather(*(client.post(f"{urls[i % 2]}/v1/completions", json=body) for i in range(8)))
        assert statuses == [200] * 7 + [429]
        assert {answer.status_code for answer in at_once} == {429}
        assert all(float(answer.headers["retry-after"]) > 0 for answer in at_once)
    except BaseException:
        print((tmp_path / "log").read_text()[-3000:])
        raise
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                async with asyncio.timeout(30):
                    await process.wait()
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()


async def _ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/ready")).status_code == 200
    except httpx.HTTPError:
        return False
