"""CPU time of one routing decision, record kept, by stack and size of the fleet.

    python benchmarks/routing.py [--repeat 5]

Each figure is the least of several runs, in microseconds of this process's CPU time. A decision is `route` and `booked`; one in
sixteen earlier requests ends in between, so that columns change as they do in service. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.config.schema import Use
from dynamo_core.plugins import Plugins
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router
from dynamo_core.routing.stack import build_stack
from dynamo_core.types import Instance

SIZES = (8, 64, 1024)
STACKS = {
    "round-robin": RouterConfig(use=Use("round-robin")),
    "random": RouterConfig(use=Use("random")),
    "power-of-two": RouterConfig(use=Use("power-of-two")),
    "least-loaded": RouterConfig(use=Use("least-loaded")),
    "least-loaded, not-full": RouterConfig(use=Use("least-loaded"), filters=(Use("not-full"),)),
}


def fleet(config: RouterConfig, plugins: Plugins, size: int) -> Router:
    router = Router("model", build_stack(config, plugins))
    for i in range(1, size + 1):
        instance = Instance(id=i, namespace="dynamo", component="backend", endpoint="generate", address="tcp://127.0.0.1:1")
        router.joined(Worker(i), instance, ModelCard(name="model", max_sequences=10**6, total_blocks=10_000))
        router.proven(Worker(i))
    return router


def decide(router: Router, prompt: list[int], start: int, count: int) -> float:
    """Microseconds of CPU a decision."""
    sent: list[tuple[str, Worker]] = []
    requests = [RoutingRequest(f"r{start + i}", "model", prompt, len(prompt)) for i in range(count)]
    began = time.process_time()
    for request in requests:
        worker = router.route(request).worker
        assert worker is not None
        router.booked(request, worker)
        sent.append((request.id, worker))
        if len(sent) % 16 == 0:
            router.finished(*sent[-16], "done")
    return (time.process_time() - began) / count * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    repeat: int = parser.parse_args().repeat
    plugins = Plugins.load()
    prompt = list(range(8192))
    print("CPU us per decision, record kept; dry: `dry_run`, which books nothing; render: a record as text\n")
    print(f"{'stack':<26}" + "".join(f"{f'{size} workers':>15}" for size in SIZES))
    for name, config in STACKS.items():
        cells: list[str] = []
        for size in SIZES:
            router = fleet(config, plugins, size)
            count = 200 if size > 500 else 2000
            cells.append(f"{min(decide(router, prompt, i * count, count) for i in range(repeat)):.1f}")
        print(f"{name:<26}" + "".join(f"{cell:>15}" for cell in cells))
    calls: dict[str, Callable[[Router], object]] = {
        "dry": lambda router: router.dry_run(RoutingRequest("r", "model", prompt)),
        "render": lambda router: next(iter(router.ring)).render(),
    }
    for name, call in calls.items():
        cells = []
        for size in SIZES:
            router = fleet(STACKS["least-loaded"], plugins, size)
            router.dry_run(RoutingRequest("r", "model", prompt))
            began = time.process_time()
            for _ in range(100):
                call(router)
            cells.append(f"{(time.process_time() - began) / 100 * 1e6:.1f}")
        print(f"{'least-loaded, ' + name:<26}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
