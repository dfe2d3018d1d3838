"""`python -m benchmarks.chaos.crowd`: many clients, many connections, many processes, a long time; writes its numbers into docs/reliability.md."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import attrs

from benchmarks.chaos import report
from benchmarks.chaos.clients import Load, difference, failures
from benchmarks.chaos.fields import open_field
from benchmarks.chaos.stage import Role, Shape, Stage
from benchmarks.procstat import cpu
from dynamo_core.config.schema import Router as RouterConfig
from dynamo_core.runtime.process import new_event_loop, raise_file_limit


@attrs.define
class Result:
    what: str
    numbers: list[str] = attrs.field(factory=list)
    wrong: list[str] = attrs.field(factory=list)


async def _judge(stage: Stage, result: Result) -> None:
    """No answer of the load may have failed, or differ by a token."""
    answers = stage.load.answers
    lost = doubled = 0
    for answer in answers:
        if not answer.error:
            a, b = difference(stage.load.expected[answer.prompt], answer.tokens)
            lost, doubled = lost + a, doubled + b
    result.numbers.append(f"{len(answers)} requests, {sum(1 for answer in answers if answer.error)} failed, {lost} tokens lost, {doubled} doubled")
    if (wrong := failures(answers)) or lost or doubled:
        result.wrong.append(f"{wrong or 'tokens differ'}")


async def streams(folder: Path, count: int, seconds: float) -> Result:
    result = Result(f"{count:,} streams at once through one frontend")
    shape = Shape(workers=4, frontends=1, streams=count, tokens=20, pace_ms=1000.0 if count > 2000 else 250.0)
    async with open_field("file", folder, shape, 1) as stage:
        frontend = stage.frontends[0]
        before, peak = frontend.resident, 0.0
        async with stage.load.under_way():
            end = time.monotonic() + seconds
            used, since = cpu([frontend.pid]), time.monotonic()
            while time.monotonic() < end:
                await asyncio.sleep(0.5)
                peak = max(peak, frontend.resident)
            share = (cpu([frontend.pid]) - used) / (time.monotonic() - since)
        await _judge(stage, result)
        ordered = sorted(answer.pause for answer in stage.load.answers if not answer.error)
        result.numbers.append(f"frontend: {before:.0f} MB before, {peak:.0f} MB at most, {share:.2f} cores")
        if ordered:
            result.numbers.append(f"longest pause of a stream: median {ordered[len(ordered) // 2]:.1f} s, worst {ordered[-1]:.1f} s")
        if (booked := await stage.booked()) > 0:
            result.wrong.append(f"{booked:g} bookings left")
    return result


async def idle(folder: Path, count: int) -> Result:
    result = Result(f"{count:,} idle connections to one frontend")
    async with open_field("file", folder, Shape(workers=2, frontends=1, streams=50), 1) as stage:
        frontend, loop = stage.frontends[0], asyncio.get_running_loop()
        before, started = frontend.resident, time.monotonic()
        sockets: list[socket.socket] = []
        for _ in range(count):
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", stage.load.port))
            sockets.append(sock)
        connected = time.monotonic() - started
        await asyncio.sleep(2.0)
        full = frontend.resident
        async with stage.load.under_way():
            await asyncio.sleep(10.0)
        for sock in sockets:
            sock.close()
        await _judge(stage, result)
        each = (full - before) * 1000 / count
        result.numbers.append(f"connected in {connected:.1f} s; frontend {before:.0f} MB before, {full:.0f} MB with them ({each:.0f} kB each)")
    return result


async def churn(folder: Path, seconds: float) -> Result:
    result = Result("24 workers and 4 frontends, a worker killed and another restarted every 2 s")
    shape = Shape(workers=24, frontends=4, streams=80, pace_ms=100.0, tokens=30)
    async with open_field("file", folder, shape, 1) as stage:
        dice = random.Random(1)
        used, since = cpu([role.pid for role in stage.frontends]), time.monotonic()
        await asyncio.sleep(10.0)
        calm = (cpu([role.pid for role in stage.frontends]) - used) / (time.monotonic() - since) / 4
        async with stage.load.under_way():
            end, down = time.monotonic() + seconds, list[Role]()
            while time.monotonic() < end:
                victim = dice.choice([role for role in stage.workers if role not in down])
                await victim.kill()
                down.append(victim)
                if len(down) > 3:
                    await down.pop(0).start()
                await asyncio.sleep(2.0)
            for role in down:
                await role.start()
            whole = await stage.until_whole()
        await _judge(stage, result)
        result.numbers.append(f"whole {whole:.1f} s after the last; an idle frontend of this fleet uses {calm * 100:.1f} % of a core")
        if (booked := await stage.booked()) > 0:
            result.wrong.append(f"{booked:g} bookings left")
    return result


async def soak(folder: Path, seconds: float, shape: Shape) -> Result:
    """Memory that only fills up what is bounded is no leak: the records of decisions are filled first, and both numbers are told."""
    result = Result(f"{seconds / 60:g} minutes of steady load")
    async with open_field("file", folder, shape, 1) as stage:
        fresh = _resident(stage)
        await _fill_records(stage)
        filled = _resident(stage)
        samples: list[float] = []
        async with stage.load.under_way():
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                await asyncio.sleep(min(5.0, seconds / 20))
                samples.append(_resident(stage))
        await _judge(stage, result)
        third = len(samples) // 3
        middle, last = max(samples[third : 2 * third]), max(samples[2 * third :])
        result.numbers.append(
            f"a frontend: {fresh:.0f} MB before the first request, {filled:.0f} MB once its records of decisions were full; "
            f"then at most {max(samples[:third]):.0f} MB in the first third, {middle:.0f} MB in the second and {last:.0f} MB in the last"
        )
        if last > middle * 1.02 + 3:
            result.wrong.append("memory grows")
    return result


def _resident(stage: Stage) -> float:
    """MB, of a frontend on average."""
    return sum(role.resident for role in stage.frontends) / len(stage.frontends)


async def _fill_records(stage: Stage) -> None:
    """Short requests until every frontend has forgotten its first decision."""
    load = Load(stage.load.port, 64, 2, 1)
    await load.learn(24)
    async with load.under_way():
        while min([await _finished(stage, frontend) for frontend in stage.frontends]) < 1.2 * RouterConfig().decisions:
            await asyncio.sleep(0.5)


async def _finished(stage: Stage, frontend: Role) -> float:
    metrics = (await stage.http.get(stage.admin[frontend.name] + "/metrics")).text
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith("dynamo_frontend_requests_total{"))


Part = Callable[[Path], Awaitable[Result]]
CROWDS: dict[str, Part] = {
    "1,000": lambda folder: streams(folder, 1000, 40.0),
    "5,000": lambda folder: streams(folder, 5000, 60.0),
    "idle": lambda folder: idle(folder, 10_000),
    "churn": lambda folder: churn(folder, 60.0),
}
LONGEST = 420.0
"""Seconds after which a crowd has had its chance."""


async def run(parts: Sequence[Part], folder: Path, longest: float | None = None) -> list[Result]:
    results: list[Result] = []
    for number, part in enumerate(parts):
        try:
            async with asyncio.timeout(longest):
                result = await part(folder / str(number))
        except Exception as e:  # the others are tried all the same
            result = Result(f"crowd {number + 1}", [], [f"the trial itself failed: {type(e).__name__}: {e}"])
        print(f"{'ok  ' if not result.wrong else 'FAIL'} {result}", flush=True)
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=float, default=20.0, help="minutes")
    parser.add_argument("--streams", type=int, default=Shape().streams, help="of the soak")
    parser.add_argument("--only", help="1,000 (streams), 5,000, idle, churn or soak")
    parser.add_argument("--results", type=Path, help="keep the numbers here, as JSON; those of earlier runs stay for what is not measured now")
    parser.add_argument("--report", type=Path, help="write the table of crowds in this page")
    options = parser.parse_args()
    raise_file_limit()
    parts: dict[str, Part] = {**CROWDS, "soak": lambda folder: soak(folder, options.soak * 60, Shape(streams=options.streams))}
    chosen = [part for name, part in parts.items() if options.only in (None, name)]
    with asyncio.Runner(loop_factory=new_event_loop) as runner, tempfile.TemporaryDirectory() as folder:
        results = runner.run(run(chosen, Path(folder)))
    failed = any(result.wrong for result in results)
    if options.results:
        results = _together(options.results, results)
    if options.report:
        write(options.report, results)
    return 1 if failed else 0


def write(page: Path, results: Sequence[Result]) -> None:
    rows = [[f"**{result.what}**", "; ".join(result.numbers), "yes" if not result.wrong else "no: " + "; ".join(result.wrong)] for result in results]
    report.replace(page, "load", "\n".join([f"{report.machine()}.", "", *report.table(["what", "seen", "kept"], rows)]))


def read(path: Path) -> list[Result]:
    """Results that a run has kept; none if there are none."""
    return [Result(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def _together(path: Path, results: Sequence[Result]) -> list[Result]:
    found = list(({result.what: result for result in read(path)} | {result.what: result for result in results}).values())
    path.write_text(json.dumps([attrs.asdict(result) for result in found], indent=1) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
