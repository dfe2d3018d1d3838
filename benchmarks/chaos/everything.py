"""`python -m benchmarks.chaos.everything`: all faults, all crowds and the soak, unattended; ends by itself, and writes all of docs/reliability.md.

The soak has processes of its own and runs beside the faults: what it asks is whether memory stays flat, and that takes time and little else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.chaos import __main__ as trials
from benchmarks.chaos import crowd, report
from benchmarks.chaos.faults import FAULTS
from dynamo_core.runtime.process import new_event_loop, raise_file_limit

_STREAMS = 100
"""Of the soak: it must leave the machine to the faults."""
_SOAK_ENDS = 300.0
"""Seconds beyond its own time that the soak may take to come up, to fill its memory and to leave."""


async def everything(page: Path, soak: float, minutes: float, seed: int, folder: Path) -> bool:
    """:param minutes: no fault begins after so many. Returns whether everything was kept."""
    results = folder / "soak.json"
    steady = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.chaos.crowd", "--only", "soak", f"--soak={soak}", f"--streams={_STREAMS}", f"--results={results}",
    )
    ends = time.monotonic() + soak * 60 + _SOAK_ENDS
    try:
        verdicts, left_out = await trials.run(FAULTS, trials.FULL, seed, folder / "faults", seconds=minutes * 60)
        report.write_faults(page, verdicts, left_out, trials.FULL, seed)
        crowds = await crowd.run(list(crowd.CROWDS.values()), folder / "crowds", crowd.LONGEST)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(1.0, ends - time.monotonic())):
                await steady.wait()
    finally:
        if steady.returncode is None:
            steady.terminate()  # its fleet follows it
            await steady.wait()
    found = [*crowds, *(crowd.read(results) or [crowd.Result(f"{soak:g} minutes of steady load", wrong=["the trial itself failed"])])]
    crowd.write(page, found)
    return not any(verdict.violations for verdict in verdicts) and not any(result.wrong for result in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=float, default=20.0, help="minutes")
    parser.add_argument("--minutes", type=float, default=30.0, help="no fault begins after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, default=Path("docs/reliability.md"))
    options = parser.parse_args()
    raise_file_limit()
    with asyncio.Runner(loop_factory=new_event_loop) as runner, tempfile.TemporaryDirectory() as folder:
        kept = runner.run(everything(options.report, options.soak, options.minutes, options.seed, Path(folder)))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
