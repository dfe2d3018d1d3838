"""A global router between a frontend's pipeline and pools of simulated workers: real planes, real pipelines, one process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from dynamo_core.config.schema import Migration, Use
from dynamo_core.testing.cluster import Cluster, read_all
from dynamo_core.types import Hints
from dynamo_global_router.engine import GlobalRouter

PROMPT = list(range(300, 520))
TIGHT = Hints(ttft_target_ms=100.0, itl_target_ms=10.0)
LOOSE = Hints(ttft_target_ms=5000.0, itl_target_ms=500.0)
FAST = {"name": "fast", "cost": 4.0, "rates": {"prefill_ms": 10.0, "itl_ms": 2.0, "learn": False}}
SLOW = {"name": "slow", "cost": 1.0, "rates": {"prefill_ms": 300.0, "itl_ms": 50.0, "learn": False}}


def sim(**options: Any) -> Use:
    return Use("sim", {"pace_ms": 1.0, "block_size": 16, **options})


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := condition()):
            await asyncio.sleep(0.01)
        return found


class Site:
    """A cluster whose frontend sees a global router, and pools behind it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.of: dict[str, list[int]] = {}
        """Numbers of the workers of each pool."""
        self.routers: list[GlobalRouter] = []

    async def worker(self, pool: str, engine: Use | None = None, **settings: Any) -> int:
        number = await self.cluster.add(engine=engine or sim(), namespace=pool, name="backend", **settings)
        self.of.setdefault(pool, []).append(number)
        return number

    async def router(self, *pools: Mapping[str, Any], name: str = "global", **options: Any) -> GlobalRouter:
        number = await self.cluster.add(engine=Use("global-router", {"pools": list(pools), **options}), name=name)
        router: Any = self.cluster.worker(number).engine
        self.routers.append(router)
        return router

    async def ready(self) -> None:
        await self.cluster.wait_ready(len(self.routers))
        for router in self.routers:
            await until(lambda router=router: all(pool.look().row.state == "ready" for pool in router._pools))
            for pool in router._pools:
                await until(lambda pool=pool: all(member.proven for member in pool.model().members.values()) and len(pool.model().members) == len(
                    [n for n in self.of[pool.name.name] if self.cluster.members[n]]))

    async def kill(self, pool: str) -> None:
        for number in self.of.pop(pool):
            await self.cluster.kill(number)

    async def ask(self, hints: Hints = LOOSE, tokens: int = 10, prompt: Sequence[int] = PROMPT, **other: Any) -> tuple[list[int], Any]:
        generation = await self.cluster.generate(prompt, max_tokens=tokens, hints=hints, **other)
        return (await read_all(generation))[1], generation

    async def story(self, generation: Any) -> list[dict[str, Any]]:
        """What the global router says of the request, as the frontend gets it."""
        return await self.cluster.catalog.further(generation.decisions[-1])

    def serving(self) -> list[str]:
        """Pools that have a request in progress."""
        return [pool for pool, numbers in self.of.items() if any(self.cluster.worker(n).admission.in_flight for n in numbers)]


@contextlib.asynccontextmanager
async def site(fast: int = 1, slow: int = 1, slow_engine: Use | None = None, **options: Any) -> AsyncIterator[Site]:
    async with bare() as found:
        for pool, count, engine in (("fast", fast, None), ("slow", slow, slow_engine)):
            for _ in range(count):
                await found.worker(pool, engine)
        await found.router(FAST, SLOW, **options)
        await found.ready()
        yield found


@contextlib.asynccontextmanager
async def bare(**cluster: Any) -> AsyncIterator[Site]:
    options: dict[str, Any] = {"migration": Migration(wait=1.0, inhibit=0.5), **cluster}
    async with Cluster.up(workers=0, engine=sim(), **options) as up:
        yield Site(up)


async def alone(tokens: int = 10) -> list[int]:
    """What one worker says to the prompt."""
    async with Cluster.up(workers=1, engine=sim()) as cluster:
        return (await read_all(await cluster.generate(PROMPT, max_tokens=tokens)))[1]
