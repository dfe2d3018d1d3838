"""What a worker inside its frontend saves against one in a process of its own, behind `tcp`: CPU for each streamed token, and memory.

    python -m benchmarks.inside [--seconds 10] [--rounds 3]

The engine is `echo`, so that what is left is what serving costs. CPU and memory are those of all processes of a stack; the stacks take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

from dynamo_core.testing.servers import free_port

AT_ONCE, TOKENS = 64, 128
MEMORY = 'discovery = "memory"\nrequest_plane = "in-process"\nevent_plane = "in-process"\n'
STACK = """
frontend = {{ port = {port} }}
observability = {{ log_level = "error" }}
[[workers]]
inside = {inside}
engine = {{ use = "echo", delay = {delay} }}
"""
LOADS = {"paced, a token each 25 ms": 0.025, "flat out": 0.0}


@contextlib.contextmanager
def stack(inside: bool, delay: float) -> Generator[tuple[int, list[int]]]:
    """Port and processes of a stack that is ready."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        path, port = Path(folder) / "stack.toml", free_port()
        planes = MEMORY if inside else f'discovery = {{ use = "file", path = "{folder}/discovery" }}\n'
        path.write_text(planes + STACK.format(port=port, inside=str(inside).lower(), delay=delay))
        processes: list[subprocess.Popen[bytes]] = []
        for role in ("frontend",) if inside else ("worker", "frontend"):
            processes.append(process := subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", role, str(path)]))
            ends.callback(process.wait)
            ends.callback(process.terminate)
        end = time.monotonic() + 60
        while not _ready(port):
            if time.monotonic() > end:
                raise TimeoutError("the stack is not ready after 60 s")
            time.sleep(0.1)
        yield port, [process.pid for process in processes]


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def measure(inside: bool, delay: float, seconds: float) -> dict[str, Any]:
    with stack(inside, delay) as (port, pids):
        words = [sys.executable, "-m", "benchmarks.loadgen", f"--port={port}", "--model=echo", "--words=20", f"--max-tokens={TOKENS}", f"--at-once={AT_ONCE}",
                 f"--seconds={seconds}", f"--group=stack={','.join(map(str, pids))}"]  # fmt: skip
        found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, timeout=seconds + 120).stdout)
    if found["errors"]:
        raise RuntimeError(f"answers were wrong: {found['error_kinds']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{AT_ONCE} streams at once, {TOKENS} tokens each; medians of {options.rounds} rounds\n")
    print("| load | worker | CPU us/token | resident MB | TTFT p50 ms |\n|---|---|---|---|---|")
    for load, delay in LOADS.items():
        rounds = [(measure(True, delay, options.seconds), measure(False, delay, options.seconds)) for _ in range(options.rounds)]
        for name, found in zip(("inside", "a process, `tcp`"), zip(*rounds, strict=True), strict=True):
            cpu = statistics.median(one["us_per_token"]["stack"] for one in found)
            memory = statistics.median(one["memory"]["stack"]["resident_mb"] for one in found)
            first = statistics.median(one["ttft_ms"]["p50"] for one in found)
            print(f"| {load} | {name} | {cpu:.1f} | {memory:.0f} | {first:.1f} |", flush=True)


if __name__ == "__main__":
    main()
