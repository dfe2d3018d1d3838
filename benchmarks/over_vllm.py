"""What this system adds to vLLM: the same tiny model behind vLLM's own server, and behind our frontend and worker.

    python -m benchmarks.over_vllm [--seconds 8] [--repeats 3]

Needs the environment that `make demo ENGINE=vllm` makes. Both serve in turns, with real vLLM on the CPU; the engine cores are counted apart, so that what
is compared is everything around them: HTTP, templates, tokens, routing, streams. Writes the figures into benchmarks/results.json and their section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from benchmarks import procstat
from benchmarks.measure import wait_for_quiet
from benchmarks.targets import MODEL, Command, Running, Target, started

ROOT = Path(__file__).parent.parent
VENV = ROOT / ".venv-vllm"
WORK = ROOT / ".dynamo/bench/over-vllm"
_PATIENCE = 400.0
"""Seconds that vLLM has to start, on a machine that others use."""
TITLES = {"vllm": "`vllm serve`", "ours": "our frontend and worker"}


@attrs.frozen
class Load:
    title: str
    words: int
    tokens: int
    at_once: int
    unary: bool = False


LOADS = {
    "single": Load("one at a time, 20 words in, 64 tokens out", 20, 64, 1),
    "crowd": Load("16 at once, 20 words in, 64 tokens out", 20, 64, 16),
}
_ARGS = {"max-model-len": 1024, "max-num-seqs": 32, "kv-cache-memory-bytes": 64 << 20, "block-size": 32, "dtype": "float32"}
_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def installed() -> bool:
    return (VENV / "bin/vllm").exists()


def _bare(work: Path, model: Path, paced: bool, port: int) -> list[Command]:
    # The command asks for the version of a distribution `vllm`; the one for CPU has another name.
    about = work / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    options = [f"--{name}={value}" for name, value in _ARGS.items()]
    argv = [str(VENV / "bin/vllm"), "serve", str(model), f"--served-model-name={MODEL}", "--host=127.0.0.1", f"--port={port}", "--enforce-eager",
            "--distributed-executor-backend=uni", *options]  # fmt: skip
    return [Command("server", argv, {**_ENV, "PYTHONPATH": str(work)})]


def _ours(work: Path, model: Path, paced: bool, port: int) -> list[Command]:
    args = ", ".join(f"{name.replace('-', '_')} = {json.dumps(value)}" for name, value in _ARGS.items())
    stack = work / "stack.toml"
    stack.write_text(
        f'[discovery]\nuse = "file"\npath = "{work}/discovery"\n\n[frontend]\nport = {port}\n\n'
        f'[[workers]]\nserved_name = "{MODEL}"\nengine = {{ use = "vllm", model = "{model}", args = {{ {args} }} }}\n'
    )
    dynamo = [str(VENV / "bin/python"), "-m", "dynamo_core.cli"]
    return [Command("worker", [*dynamo, "worker", str(stack), "--index=0"], _ENV), Command("frontend", [*dynamo, "frontend", str(stack)], _ENV)]


TARGETS: dict[str, Target] = {"vllm": _bare, "ours": _ours}


def measure(repeats: int = 3, seconds: float = 8.0) -> dict[str, Any]:
    """By system and load, one entry for each repeat. :raises NotReady: a system does not start."""
    model = WORK / "model"
    maker = ROOT / "plugins/dynamo-vllm/tests/tiny_model.py"
    subprocess.run([str(VENV / "bin/python"), str(maker), str(model)], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = {name: {load: [] for load in LOADS} for name in TARGETS}
    for repeat in range(repeats):
        for name in (list(TARGETS), list(reversed(TARGETS)))[repeat % 2]:
            print(f"repeat {repeat + 1} of {repeats}: {TITLES[name]}", file=sys.stderr, flush=True)
            with started(TARGETS[name], WORK / name, model, paced=False, patience=_PATIENCE) as running:
                for load in LOADS:
                    wait_for_quiet()
                    found[name][load].append(_phase(running, LOADS[load], seconds, repeat + 1))
    return found


def _phase(running: Running, load: Load, seconds: float, seed: int) -> dict[str, Any]:
    roots = [pid for pids in running.groups.values() for pid in pids]
    cores = [pid for pid in procstat.tree(roots) if b"EngineCore" in _named(pid)]
    assert cores, "there is an engine core somewhere"
    command = [
        sys.executable, "-m", "benchmarks.loadgen", f"--port={running.port}", f"--model={MODEL}", f"--words={load.words}", f"--max-tokens={load.tokens}",
        f"--at-once={load.at_once}", f"--seconds={seconds}", "--warm-up=2", f"--seed={seed}",
        f"--group=all={','.join(map(str, roots))}", f"--group=engine={','.join(map(str, cores))}",
    ]
    phase = json.loads(subprocess.run(command, capture_output=True, timeout=150, check=True, cwd=ROOT).stdout)
    around = phase["us_per_token"]["all"] - phase["us_per_token"]["engine"]
    return {"around_us_per_token": around, "engine_us_per_token": phase["us_per_token"]["engine"], "ttft_ms": phase["ttft_ms"], "done": phase["done"],
            "errors": phase["errors"], "others_cores": phase["others_cores"], "requests_per_s": phase["requests_per_s"]}  # fmt: skip


def _named(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/comm").read_bytes()
    except OSError:
        return b""


def section(results: dict[str, Any]) -> list[str]:
    """Lines of docs/performance.md."""
    lines = ["## Over bare vLLM", "",
             "A tiny Llama (one megabyte) on real vLLM for CPU, served by `vllm serve` and by our frontend and one worker, in turns. CPU is that of every process but the",
             "engine cores: their work is the same. With weights this small the engine is fast, and what stands around it shows.", ""]  # fmt: skip
    others = median(run["others_cores"] for loads in results.values() for runs in loads.values() for run in runs)
    lines += [f"Other processes used {others:.1f} cores meanwhile (median)." + ("" if others < 0.3 else " **The machine was not quiet.**"), ""]
    for key, load in LOADS.items():
        lines += [f"{load.title[0].upper()}{load.title[1:]}:", "", "| system | CPU us/token around the engine | of the engine | TTFT p50 / p99 ms | requests/s | errors |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name, title in TITLES.items():
            runs: Sequence[dict[str, Any]] = results[name][key]
            costs = sorted(run["around_us_per_token"] for run in runs)
            lines.append(f"| {title} | {median(costs):,.0f} ({costs[0]:,.0f} to {costs[-1]:,.0f}) | {median(r['engine_us_per_token'] for r in runs):,.0f} | "
                         f"{median(r['ttft_ms']['p50'] for r in runs):.1f} / {median(r['ttft_ms']['p99'] for r in runs):.1f} | "
                         f"{median(r['requests_per_s'] for r in runs):.1f} | {sum(r['errors'] for r in runs)} |")  # fmt: skip
        lines.append("")
    return lines


def _replaced(page: str, lines: str) -> str:
    """The page with these lines in place of what it had of them, or before its last paragraph: the other figures are from other runs."""
    begin = page.find("## Over bare vLLM")
    if begin < 0:
        begin = end = page.index("To compare with ai-dynamo")
    else:
        end = page.index("To compare with ai-dynamo", begin)
    return f"{page[:begin]}{lines}\n{page[end:]}"


def main() -> int:
    from benchmarks.run import PAGE, RESULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if not installed():
        parser.error(f"{VENV} is not there: make demo ENGINE=vllm makes it")
    found = measure(options.repeats, options.seconds)
    results = json.loads(RESULTS.read_text()) | {"over_vllm": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(_replaced(PAGE.read_text(), "\n".join(section(found))))
    print("\n".join(section(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
