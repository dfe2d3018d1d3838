"""Systems started side by side: idle figures of each, then scenarios, in which they take turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import procstat
from benchmarks.scenarios import Scenario
from benchmarks.targets import MODEL, NotReady, Running, Target, started

QUIET = 0.15
"""Cores that others may use when a phase begins."""
PATIENCE = 5.0
"""Seconds to wait for that."""


def measure(targets: Mapping[str, Target], scenarios: Sequence[Scenario], work: Path, model: Path, *, seed: int, speed: float = 1.0) -> dict[str, Any]:
    """Scenarios of one pace. All systems run, and all but one have nothing to do; in each scenario they take turns. One that does not start is left out.

    :param speed: above 1, phases are shorter by that.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for name, target in targets.items():
            try:
                running[name] = stack.enter_context(started(target, work / name, model, paced=scenarios[0].paced))
            except NotReady as e:
                print(f"  {name}: {e}", file=sys.stderr)
        results: dict[str, Any] = {
            name: {"ready_s": system.ready_seconds, "idle": idle(system, 4.0 / speed), "scenarios": {}} for name, system in running.items()
        }
        for scenario in scenarios:
            for name, system in running.items():
                wait_for_quiet()
                results[name]["scenarios"][scenario.name] = load(system, scenario, seed, speed)
        return results


def idle(running: Running, seconds: float) -> dict[str, float]:
    """Of the frontend, doing nothing."""
    time.sleep(1.0)
    pids = running.groups["frontend"]
    before, start = procstat.cpu(pids), time.monotonic()
    time.sleep(seconds)
    return {**procstat.memory(pids), "cpu_percent": (procstat.cpu(pids) - before) / (time.monotonic() - start) * 100}


def load(running: Running, scenario: Scenario, seed: int, speed: float) -> dict[str, Any]:
    """Run the load generator in a process of its own."""
    command = [
        sys.executable, "-m", "benchmarks.loadgen", f"--port={running.port}", f"--model={MODEL}",
        f"--words={scenario.words}", f"--max-tokens={scenario.tokens}", f"--at-once={scenario.at_once}",
        f"--seconds={scenario.seconds / speed}", f"--warm-up={scenario.warm_up / speed}", f"--seed={seed}",
        *(["--unary"] if not scenario.stream else []),
        *(f"--group={role}={','.join(map(str, pids))}" for role, pids in running.groups.items()),
    ]
    process = subprocess.run(command, capture_output=True, timeout=150, check=False)
    if process.returncode:
        return {"failed": process.stderr.decode()[-500:], "errors": 1, "done": 0}
    return json.loads(process.stdout)


def wait_for_quiet() -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        before = procstat.busy()
        time.sleep(0.5)
        if (procstat.busy() - before) / 0.5 < QUIET:
            return


def help_cpu_ms() -> float:
    """CPU of `dynamo --help`, the least of five."""
    costs: list[float] = []
    for _ in range(5):
        before = os.times()
        subprocess.run([sys.executable, "-m", "dynamo_core.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        costs.append((after.children_user - before.children_user + after.children_system - before.children_system) * 1000)
    return min(costs)
