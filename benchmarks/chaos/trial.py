"""One fault under load, and the judgement."""

from __future__ import annotations

import asyncio
import random
import time

import attrs
import httpx

from benchmarks.chaos.clients import difference, failures
from benchmarks.chaos.faults import GRACE, Fault, Harm
from benchmarks.chaos.stage import Stage

BACK = 45.0
"""Seconds in which the fleet must be whole again after the cause of a fault is gone."""
FREE = 15.0
"""Seconds after the last answer in which no booking may be left."""


@attrs.define
class Verdict:
    fault: str
    what: str
    requests: int = 0
    failed: int = 0
    broken: int = 0
    lost: int = 0
    """Tokens that a complete answer lacks."""
    doubled: int = 0
    moved: int = 0
    """Answers that more than one worker gave."""
    retried: int = 0
    """Connections that were refused or closed unanswered, and tried again."""
    pause: float = 0.0
    """The longest time in which a client that was served to the end heard nothing, in seconds."""
    steady: float | None = None
    """Seconds from the fault until a whole second brought 80 % of the usual tokens again."""
    whole: float | None = None
    """Seconds after the cause was gone until every frontend had every worker and no problem."""
    stale: int = 0
    """Decisions for a worker that was gone, after its lease ended."""
    booked: float = 0.0
    """Requests that the routers still count although none is in progress."""
    grown: float = 0.0
    """MB by which the largest frontend grew."""
    violations: list[str] = attrs.field(factory=list)
    errors: dict[str, int] = attrs.field(factory=dict)


async def attempt(fault: Fault, stage: Stage, seed: int) -> Verdict:
    """Hurt the fleet while it works. The dice, and so the victim, depend on the seed and the fault's name alone."""
    verdict, harm, load = Verdict(fault.name, fault.what), Harm(), stage.load
    await stage.until_whole()
    async with load.under_way():
        await asyncio.sleep(2.0 + stage.shape.usual)
        memory = {role.name: (role.starts, role.resident) for role in stage.frontends}
        hurt = time.monotonic()
        usual = load.rate(hurt - stage.shape.usual, hurt)
        first = len(load.answers)
        await fault.run(stage, random.Random(f"{seed} {fault.name}"), harm)
        healed = time.monotonic()
        try:
            verdict.whole = await stage.until_whole(BACK)
        except TimeoutError as e:
            verdict.violations.append(f"not whole again: {e}")
        quiet = harm.watch
        if harm.gone:
            quiet = max(quiet, harm.gone_since + 2.0 - time.time())
        await asyncio.sleep(quiet)
        if harm.gone:
            verdict.stale = len(await stage.decisions_for(harm.gone, harm.gone_since))
    verdict.steady = load.steady_again(hurt + 0.2, usual)
    verdict.grown = max((role.resident - memory[role.name][1] for role in stage.frontends if memory[role.name][0] == role.starts), default=0.0)
    await _look_for_bookings(stage, verdict)
    _count(verdict, harm, stage, first, healed - hurt)
    return verdict


async def _look_for_bookings(stage: Stage, verdict: Verdict) -> None:
    end = time.monotonic() + FREE
    while True:
        try:
            verdict.booked = await stage.booked()
        except httpx.HTTPError as e:
            verdict.violations.append(f"a frontend does not answer after the load: {type(e).__name__}")
            return
        if verdict.booked == 0 or time.monotonic() > end:
            return
        await asyncio.sleep(0.5)


def _count(verdict: Verdict, harm: Harm, stage: Stage, first: int, lasted: float) -> None:
    answers = stage.load.answers[first:]
    verdict.requests = len(answers)
    for answer in answers:
        verdict.retried += answer.retried
        verdict.moved += len(answer.workers) > 1
        if answer.broken:
            verdict.broken += 1
        elif answer.error:
            verdict.failed += 1
        else:
            lost, doubled = difference(stage.load.expected[answer.prompt], answer.tokens)
            verdict.lost, verdict.doubled = verdict.lost + lost, verdict.doubled + doubled
            verdict.pause = max(verdict.pause, answer.pause)
    verdict.errors = failures(answers)
    say = verdict.violations.append
    if verdict.failed and not harm.may_fail:
        say(f"{verdict.failed} requests failed")
    if verdict.broken and not (harm.may_break or harm.may_fail):
        say(f"{verdict.broken} streams broke")
    if verdict.lost or verdict.doubled:
        say(f"{verdict.lost} tokens lost, {verdict.doubled} doubled")
    if verdict.stale:
        say(f"{verdict.stale} decisions for a worker whose lease had ended {GRACE:g} s before (lease {stage.shape.ttl:g} s)")
    if verdict.booked:
        say(f"{verdict.booked:g} bookings were left {FREE:g} s after the last answer")
    if verdict.steady is None:
        say("the usual rate did not come back")
