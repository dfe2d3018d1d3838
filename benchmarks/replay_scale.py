"""What a replay costs: CPU time for each request, and peak memory, by policy.

    python -m benchmarks.replay_scale --requests 1000000 --workers 1000 --stacks round-robin,kv

Chats of 5 turns on the average, three requests a second for every four workers. Each policy runs in a process of its own, and says on the error
output how far it is.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from dynamo_sim.replay.command import resolve
from dynamo_sim.replay.report import report
from dynamo_sim.replay.simulate import Options, simulate
from dynamo_sim.replay.synthetic import chats


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(stack: str, requests: int, workers: int) -> str:
    trace = chats(requests, rate=0.75 * workers, seed=1)
    made = peak_mib()
    router, plugins = resolve(stack)
    began = time.process_time()
    said = 0

    def progress(ended: int, now: float) -> None:
        nonlocal said
        if ended - said >= 50_000:
            said = ended
            print(f"{stack}: {ended:,} requests, {time.process_time() - began:.0f} s of CPU time, {peak_mib():.0f} MiB", file=sys.stderr, flush=True)

    outcome = simulate(trace, router, plugins, Options(workers=workers), progress)
    spent = time.process_time() - began
    peak = peak_mib()
    hit = report(stack, trace, outcome).hit_rate
    return f"| {requests:,} | {workers:,} | {stack} | {spent / requests * 1e6:.0f} | {spent:.0f} | {made:.0f} | {peak:.0f} | {hit:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--stacks", default="round-robin,kv,kv-plus")
    options = parser.parse_args()
    print("| requests | workers | policy | CPU us a request | CPU s | MiB with the trace alone | MiB at most | hit rate |")
    print("|---|---|---|---|---|---|---|---|")
    for stack in options.stacks.split(","):
        with ProcessPoolExecutor(1) as alone:
            print(alone.submit(measure, stack, options.requests, options.workers).result(), flush=True)


if __name__ == "__main__":
    main()
