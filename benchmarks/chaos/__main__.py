"""`python -m benchmarks.chaos`: hurts fleets of real processes under load, and writes what happened into docs/reliability.md."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos import report
from benchmarks.chaos.faults import FAULTS, Fault
from benchmarks.chaos.fields import missing, open_field
from benchmarks.chaos.stage import Shape, Stage
from benchmarks.chaos.trial import Verdict, attempt
from dynamo_core.runtime.process import new_event_loop, raise_file_limit

LONGEST = 400.0
"""Seconds after which one fault has had its chance."""
FULL, SHORT = Shape(), Shape(workers=3, frontends=2, streams=24, tokens=40, pace_ms=20, ttl=4, usual=3)


async def run(
    faults: Sequence[Fault], shape: Shape, seed: int, folder: Path, say: bool = True, seconds: float = math.inf
) -> tuple[list[Verdict], dict[str, str]]:
    """Try every fault, as long as there is time: none begins after `seconds`. Returns the verdicts, and why fields were left out."""
    end = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    left_out: dict[str, str] = {}
    for field in dict.fromkeys(fault.field for fault in faults):
        if (why := missing(field)) is not None:
            left_out[field] = why
            continue
        here = [fault for fault in faults if fault.field == field]
        if time.monotonic() > end:
            verdicts += [_failed(fault, TimeoutError("the time was up")) for fault in here]
            continue
        try:
            async with open_field(field, folder / field, shape, seed) as stage:
                for fault in here:
                    if (started := time.monotonic()) > end:
                        verdicts.append(_failed(fault, TimeoutError("the time was up")))
                        continue
                    verdicts.append(verdict := await _tried(fault, stage, seed))
                    if say:
                        print(f"{'ok  ' if not verdict.violations else 'FAIL'} {fault.name}: {time.monotonic() - started:.0f} s, {verdict}", flush=True)
        except Exception as e:  # its fleet did not come up, or did not go: the other fields are tried all the same
            seen = {verdict.fault for verdict in verdicts}
            verdicts += [_failed(fault, e) for fault in here if fault.name not in seen]
            print(f"FAIL {field}: {type(e).__name__}: {e}", flush=True)
    return verdicts, left_out


async def _tried(fault: Fault, stage: Stage, seed: int) -> Verdict:
    try:
        async with asyncio.timeout(LONGEST):
            return await attempt(fault, stage, seed)
    except Exception as e:
        return _failed(fault, e)


def _failed(fault: Fault, error: Exception) -> Verdict:
    return Verdict(fault.name, fault.what, violations=[f"the trial itself failed: {type(error).__name__}: {error}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="faults whose name contains this")
    parser.add_argument("--field", action="append", default=[], help="file, network, clock, etcd, nats, nats-network or certificates")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=FULL.streams)
    parser.add_argument("--short", action="store_true", help="a small fleet, and the faults of the shortened suite")
    parser.add_argument("--keep", type=Path, help="where logs go; default: a temporary directory that is deleted")
    parser.add_argument("--results", type=Path, help="keep the verdicts here, as JSON; those of earlier runs stay for faults that are not tried now")
    parser.add_argument("--report", type=Path, help="write the table of faults in this page")
    options = parser.parse_args()
    raise_file_limit()
    chosen = [
        fault
        for fault in FAULTS
        if (not options.only or any(text in fault.name for text in options.only))
        and (not options.field or fault.field in options.field)
        and (fault.short or not options.short)
    ]
    shape = SHORT if options.short else Shape(streams=options.streams)
    with asyncio.Runner(loop_factory=new_event_loop) as runner, tempfile.TemporaryDirectory() as temporary:
        verdicts, left_out = runner.run(run(chosen, shape, options.seed, options.keep or Path(temporary)))
    for field, why in left_out.items():
        print(f"left out: {field}: {why}")
    if options.results:
        verdicts = report.together(options.results, verdicts)
    if options.report:
        report.write_faults(options.report, verdicts, left_out, shape, options.seed)
    return 1 if any(verdict.violations for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
