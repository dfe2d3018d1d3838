"""A second stack that sees the same facts and decides nothing: its choice is compared with the live one.

It runs after the live decision is made, on a share of the decisions, and stops by itself when it costs too much or keeps
raising. It cannot change facts (columns are read-only), the dice (it has its own) or the request.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

import attrs

from dynamo_core.routing.contract import Dice, Worker
from dynamo_core.routing.decide import Stack, said
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.routing.record import Decision

log = logging.getLogger(__name__)

Verdict = Literal["same", "other", "nobody", "failed", "skipped"]


@attrs.frozen
class Comparison:
    """What the shadow would have done in one decision."""

    decision: str
    verdict: Verdict
    worker: Worker | None = None
    overlap_gain: int = 0
    """Cached prompt tokens of its choice minus those of the live one."""


@attrs.define(eq=False)
class Shadow:
    """Decides along. `budget` is the share of wall time that it may use; `faults` in a row end it."""

    stack: Stack
    sample: float = 1.0
    budget: float = 0.01
    faults: int = 5
    clock: Callable[[], float] = time.perf_counter
    stopped: str = ""
    """Why it decides no more; empty while it does."""
    seen: int = attrs.field(default=0, init=False)
    same: int = attrs.field(default=0, init=False)
    other: int = attrs.field(default=0, init=False)
    overlap_gain: int = attrs.field(default=0, init=False)
    recent: deque[Comparison] = attrs.field(factory=lambda: deque(maxlen=1024), init=False)
    _spent: float = attrs.field(default=0.0, init=False)
    _since: float | None = attrs.field(default=None, init=False)
    _broken: int = attrs.field(default=0, init=False)

    def follow(self, decision: Decision) -> Comparison | None:
        """Decide the same again, and compare. Never raises."""
        if self.stopped or (self.sample < 1.0 and Dice(decision.seed ^ 0x5EED).uniform() >= self.sample):
            return None
        started = self.clock()
        if self._since is None:
            self._since = started
        try:
            choice = self.stack.decide(decision.request, decision.workers, decision.columns, Dice(decision.seed))
            comparison = self._compare(decision, choice.worker)
            self._broken = self._broken + 1 if choice.faults else 0
            why = f"{choice.faults[0][0]}: {choice.faults[0][1]}" if choice.faults else ""
        except Exception as e:
            comparison, why = Comparison(decision.id, "failed"), said(e)
            self._broken += 1
        self._charge(started, why)
        self.recent.append(comparison)
        return comparison

    def _compare(self, decision: Decision, worker: Worker | None) -> Comparison:
        self.seen += 1
        if worker is None:
            return Comparison(decision.id, "nobody")
        gain = 0
        if worker == decision.worker:
            self.same += 1
        else:
            self.other += 1
            if (overlaps := decision.columns.get(OVERLAP_TOKENS)) is not None:
                gain = int(overlaps[list(decision.workers).index(worker)]) - decision.overlap_tokens
                self.overlap_gain += gain
        return Comparison(decision.id, "same" if worker == decision.worker else "other", worker, gain)

    def _charge(self, started: float, why: str) -> None:
        now = self.clock()
        self._spent += now - started
        if self._broken >= self.faults:
            self._stop(f"it broke its contract {self._broken} times in a row, last: {why}")
        elif self._spent > max(0.05, self.budget * (now - (self._since or now))):
            self._stop(f"it used {self._spent:.3f} s in {now - (self._since or now):.1f} s, its budget is {self.budget:.1%}")

    def _stop(self, why: str) -> None:
        self.stopped = why
        log.warning("the shadow stack %s is stopped: %s", self.stack.hash, why)

    def status(self) -> dict[str, object]:
        """For `/debug/fleet`."""
        return {"stack": self.stack.hash, "seen": self.seen, "same": self.same, "other": self.other, "overlap_gain": self.overlap_gain, "stopped": self.stopped}
