"""What the planes cost, all in one run: a token of each request plane, an event of each event plane. Writes its part of docs/performance.md.

    python -m benchmarks.planes [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.procstat import cpu
from dynamo_core.testing.servers import NatsCluster

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/planes.json"
MARKS = ("<!-- planes: written by python -m benchmarks.planes -->", "<!-- end of planes -->")
KINDS = {"transport": ("tcp", "http", "nats"), "events": ("zmq", "nats")}
LOADS: Mapping[str, Sequence[tuple[str, str, Sequence[str]]]] = {
    "transport": [
        ("paced", "64 streams, a token each 25 ms", ("--steps", "400", "--pace", "0.025")),
        ("flat out", "64 streams, as fast as they go", ("--steps", "2000", "--pace", "0")),
    ],
    "events": [
        ("paced", "256 bytes, 10 each 5 ms", ("--events", "20000", "--pace", "0.005")),
        ("flat out", "256 bytes, 10 in each turn of the loop", ("--events", "100000", "--pace", "0")),
    ],
}


def measure(quick: bool) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        nats = NatsCluster(Path(folder) / "nats")
        try:
            for kind, planes in KINDS.items():
                for load, meaning, options in LOADS[kind]:
                    for plane in planes:
                        found.append({"kind": kind, "plane": plane, "load": load, "meaning": meaning, **_one(kind, plane, options, nats, quick)})
                        print(found[-1], file=sys.stderr, flush=True)
        finally:
            nats.kill()
    return {"date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "rows": found}


def _one(kind: str, plane: str, options: Sequence[str], nats: NatsCluster, quick: bool) -> dict[str, float]:
    if quick:
        options = [*options, *{"transport": ("--steps", "20"), "events": ("--events", "500")}[kind]]
    broker = [nats.nodes[0].pid] if plane == "nats" else []
    before = cpu(broker) if broker else 0.0
    run = subprocess.run([sys.executable, "-m", f"benchmarks.{kind}", plane, "--json", "--servers", nats.servers[0], *options], cwd=ROOT, check=True, text=True,
                         capture_output=True, timeout=180)
    figures: dict[str, float] = json.loads(run.stdout)
    if broker:
        figures["broker_us"] = (cpu(broker) - before) / figures["count"] * 1e6
    return figures


def section(results: Mapping[str, Any]) -> str:
    lines = [MARKS[0], "", "## Planes", "",
             "CPU microseconds of each process, by `python -m benchmarks.planes`: the worker that sends and the frontend that receives, per token or per event. Tokens that are there together travel",
             f"together, so flat out costs less. Measured {results['date']} on {results['cpus']} cores; load average {results['load_average']:.1f} at the end.", ""]
    for kind, title, heads in (("transport", "Request planes", ("worker", "frontend", "tokens per read")), ("events", "Event planes", ("publisher", "subscriber"))):
        lines += [f"### {title}", "", f"| plane | load | {' | '.join(heads)} | broker |", "|---" * (len(heads) + 3) + "|", *_rows(results, kind), ""]
    return "\n".join([*lines, MARKS[1]])


def _rows(results: Mapping[str, Any], kind: str) -> Iterator[str]:
    for row in results["rows"]:
        if row["kind"] == kind:
            figures = [f"{row['sender_us']:.1f}", f"{row['receiver_us']:.1f}", *([f"{row['merged']:.1f}"] if kind == "transport" else [])]
            broker = f"{row['broker_us']:.1f}" if "broker_us" in row else "-"
            yield f"| `{row['plane']}` | {row['load']}: {row['meaning']} | {' | '.join(figures)} | {broker} |"


def known() -> str:
    """The part of the page from the run before; empty: there was none."""
    return section(json.loads(RESULTS.read_text())) if RESULTS.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to see that it works; writes nothing")
    options = parser.parse_args()
    results = measure(options.quick)
    part = section(results)
    print(part)
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        page = PAGE.read_text()
        before, mark, rest = page.partition(MARKS[0])
        after = rest.partition(MARKS[1])[2] if mark else ""
        PAGE.write_text(f"{before.rstrip()}\n\n{part}\n{after.lstrip()}")


if __name__ == "__main__":
    main()
