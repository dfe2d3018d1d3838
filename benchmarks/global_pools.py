"""Targets met and what it cost, by pool strategy: a load that rises and falls before a fast, expensive pool and a slow, cheap one, simulated in real time.

    python -m benchmarks.global_pools [--seeds 3]

Each strategy gets the same requests at the same times. A request counts as met when its time to the first token and its mean time between tokens both were.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import time
from typing import Any

import attrs

from dynamo_core.config.schema import Use
from dynamo_core.testing.cluster import Cluster
from dynamo_core.types import Hints

TTFT, ITL = 500.0, 45.0
PHASES = ((3, 6.0), (10, 5.0), (3, 6.0))
"""Requests a second, and for how many seconds."""
COST = {"fast": 4.0, "slow": 1.0}
ENGINES = {
    "fast": {"linear": {"step": 8.0, "prefill_token": 0.02, "decode": 0.2, "used_block": 0.0}, "max_sequences": 64},
    "slow": {"linear": {"step": 25.0, "prefill_token": 0.15, "decode": 0.2, "used_block": 0.0}, "max_sequences": 16},
}


def _always(pool: str) -> dict[str, Any]:
    return {"use": "grid", "table": [[pool]], "ttft_ms": {"min": 0, "max": 1, "steps": 1}, "itl_ms": {"min": 0, "max": 1, "steps": 1}}


STRATEGIES: dict[str, dict[str, Any]] = {
    "`predicted`, rates learned": {"use": "predicted"},
    "`grid`: prompts over 1,500 tokens to the fast pool": {**_always("fast"), "table": [[["slow"]], [["fast"]]], "input": {"min": 0, "max": 3000, "steps": 2}},
    "always the fast pool": _always("fast"),
    "always the slow pool": _always("slow"),
}


@attrs.frozen
class Result:
    met: bool
    pool: str
    tokens: int
    ttft_ms: float


def arrivals(seed: int) -> list[tuple[float, list[int], int]]:
    """When, the prompt, and how many tokens to generate."""
    rng = random.Random(seed)
    found: list[tuple[float, list[int], int]] = []
    now = 0.0
    for rate, seconds in PHASES:
        end = now + seconds
        while (now := now + rng.expovariate(rate)) < end:
            found.append((now, [rng.randint(300, 2900) for _ in range(rng.randint(100, 3000))], rng.randint(20, 60)))
        now = end
    return found


async def run(strategy: dict[str, Any], seed: int) -> list[Result]:
    pools = [{"name": name, "cost": COST[name], "router": {"use": "least-loaded"}} for name in ENGINES]
    async with Cluster.up(workers=0, engine=Use("sim"), request_plane=Use("tcp")) as cluster:
        for name, options in ENGINES.items():
            await cluster.add(engine=Use("sim", {"block_size": 16, **options}), namespace=name)
        await cluster.add(engine=Use("global-router", {"pools": pools, "strategy": strategy}), name="global-router")
        await cluster.wait_ready(1)
        started = time.monotonic() + 0.1

        async def one(at: float, prompt: list[int], tokens: int) -> Result:
            await asyncio.sleep(max(0.0, started + at - time.monotonic()))
            sent = time.monotonic()
            generation = await cluster.generate(prompt, max_tokens=tokens, hints=Hints(ttft_target_ms=TTFT, itl_target_ms=ITL))
            first = last = 0.0
            while await generation.read():
                last = time.monotonic()
                first = first or last
            ttft, itl = 1000 * (first - sent), 1000 * (last - first) / (tokens - 1)
            choice = (await cluster.catalog.further(generation.decisions[-1]))[0]
            return Result(ttft <= TTFT and itl <= ITL, choice["served"], tokens, ttft)

        return await asyncio.gather(*(one(*arrival) for arrival in arrivals(seed)))


async def main(seeds: int) -> None:
    logging.disable(logging.WARNING)
    print(f"| strategy | targets met (TTFT {TTFT:g} ms, ITL {ITL:g} ms) | cost of a token | TTFT p50 / p95, ms |\n|---|---|---|---|")
    for name, strategy in STRATEGIES.items():
        results = [await run(strategy, seed) for seed in range(seeds)]
        met = [sum(r.met for r in rs) / len(rs) for rs in results]
        flat = [r for rs in results for r in rs]
        cost = sum(COST[r.pool] * r.tokens for r in flat) / sum(r.tokens for r in flat)
        ttft = statistics.quantiles([r.ttft_ms for r in flat], n=20)
        print(f"| {name} | {sum(met) / len(met):.0%} ({min(met):.0%} to {max(met):.0%}) | {cost:.2f} | {ttft[9]:.0f} / {ttft[18]:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    asyncio.run(main(parser.parse_args().seeds))
