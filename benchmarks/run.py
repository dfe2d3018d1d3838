"""Measure this system, and its peer where one is installed; write benchmarks/results.json and docs/performance.md.

    python -m benchmarks.run [--targets hypercorn,uvicorn,dynamo,direct] [--scenarios short,paced] [--repeats 3] [--quick] [--micro]

A run of fewer targets or scenarios, or a quick one, prints its page and replaces neither file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import model, over_vllm, report
from benchmarks.measure import help_cpu_ms, measure
from benchmarks.scenarios import ALL
from benchmarks.targets import OURS, PEER, Target, available

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".dynamo/bench"
RESULTS = ROOT / "benchmarks/results.json"
PAGE = ROOT / "docs/performance.md"
MICRO = ("transport", "preprocess", "routing", "kv_index", "http_surface")
"""Benchmarks of one room each; they print tables of their own."""
ALONE = (*MICRO, "planner", "planner_processes")
"""Those that can be chosen by name. The planner's take minutes and three quarters of an hour, and are no part of the others."""


def run(targets: dict[str, Target], scenarios: list[str], repeats: int, speed: float, folder: Path) -> dict[str, Any]:
    """Every repeat starts all targets anew, side by side. They then take turns within each scenario, because a machine that others share
    drifts by a tenth within minutes: what is compared is measured seconds apart."""
    found: dict[str, Any] = {name: {"idle": [], "ready_s": [], "scenarios": {}} for name in targets}
    names = list(targets)
    for repeat in range(repeats):
        shift = repeat % len(names)
        turns = {name: targets[name] for name in names[shift:] + names[:shift]}
        for paced in (False, True):
            chosen = [ALL[scenario] for scenario in scenarios if ALL[scenario].paced is paced]
            if not chosen:
                continue
            print(f"repeat {repeat + 1} of {repeats}: {', '.join(scenario.name for scenario in chosen)}", file=sys.stderr, flush=True)
            for name, result in measure(turns, chosen, WORK / "run", folder, seed=repeat + 1, speed=speed).items():
                found[name]["idle"].append(result["idle"])
                found[name]["ready_s"].append(result["ready_s"])
                for scenario, phase in result["scenarios"].items():
                    found[name]["scenarios"].setdefault(scenario, []).append(phase)
    return found


def about(command: str, targets: dict[str, Any]) -> dict[str, Any]:
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    others = [phase["others_cores"] for target in targets.values() for phases in target["scenarios"].values() for phase in phases if phase.get("done")]
    return {
        "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "cpu": models[0] if models else platform.machine(), "kernel": platform.release(),
        "python": f"{platform.python_version()} ({sys.base_prefix}, {platform.python_compiler()})", "command": command, "others_cores": median(others) if others else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="", help="default: all that are installed")
    parser.add_argument("--scenarios", default=",".join(ALL))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one repeat of short phases: to see that it works, not to quote")
    parser.add_argument("--micro", action="store_true", help="the rooms one by one instead; writes nothing")
    parser.add_argument("--alone", choices=ALONE, help="one of these and nothing else; writes nothing")
    parser.add_argument("--peers", type=Path, default=os.environ.get("PEERS") or None, help="folder with the environment `dyn` (default: $PEERS)")
    options = parser.parse_args()
    if options.alone:
        return subprocess.run([sys.executable, "-m", f"benchmarks.{options.alone}"], cwd=ROOT, check=False).returncode
    if options.micro:
        return max(subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=False).returncode for name in MICRO)
    installed = available(options.peers)
    names = options.targets.split(",") if options.targets else [*OURS, *([PEER] if PEER in installed else []), "direct"]
    scenarios = options.scenarios.split(",")
    if unknown := [name for name in names if name not in installed] + [name for name in scenarios if name not in ALL]:
        parser.error(f"not there: {', '.join(unknown)}; targets: {', '.join(installed)}; scenarios: {', '.join(ALL)}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    folder = model.build(WORK / "model")
    command = " ".join([*(["PEERS=..."] if options.peers else []), "python -m benchmarks.run", *sys.argv[1:]])
    targets = run({name: installed[name] for name in names}, scenarios, 1 if options.quick else options.repeats, 3.0 if options.quick else 1.0, folder)
    stall = subprocess.run([sys.executable, "-m", "benchmarks.stall", str(folder)], capture_output=True, text=True, check=True, cwd=ROOT)
    results = {"about": about(command, targets), "targets": targets, "help_cpu_ms": help_cpu_ms(), "stall_ms": float(stall.stdout)}
    if over_vllm.installed() and not (options.quick or options.targets or len(scenarios) < len(ALL)):
        results["over_vllm"] = over_vllm.measure(options.repeats)
    elif RESULTS.exists() and "over_vllm" in (before := json.loads(RESULTS.read_text())):
        results["over_vllm"] = before["over_vllm"]
    page = report.page(results)
    if options.quick or options.targets or len(scenarios) < len(ALL):
        (WORK / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{page}\n(a part of the benchmark: {WORK}/results.json was written, and not {PAGE})")
    else:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page)
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
