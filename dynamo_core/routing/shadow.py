"""A second stack that sees the same facts and decides nothing: its choice is compared with the live one.

It runs after the live decision is made, on a thread of its own and on a share of the decisions, and stops by itself when it costs too much or
keeps raising. It cannot change facts (columns are read-only), the dice (it has its own) or the request.
"""

from __future__ import annotations

import logging
import queue
import threading
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
    """Decides along. `budget` is the share of a CPU that it may use; `faults` in a row end it."""

    stack: Stack
    sample: float = 1.0
    budget: float = 0.01
    faults: int = 5
    clock: Callable[[], float] = time.monotonic
    cpu: Callable[[], float] = time.thread_time
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

    def wants(self, decision: Decision) -> bool:
        """Whether this one is in its share."""
        return not self.stopped and (self.sample >= 1.0 or Dice(decision.seed ^ 0x5EED).uniform() < self.sample)

    def follow(self, decision: Decision) -> Comparison | None:
        """Decide the same again, and compare. Never raises."""
        if not self.wants(decision):
            return None
        started = self.cpu()
        if self._since is None:
            self._since = self.clock()
        try:
            choice = self.stack.decide(decision.request, decision.workers, decision.columns, Dice(decision.seed))
            # What is left of a stack without a part that broke is another stack: nothing to compare.
            comparison = Comparison(decision.id, "failed") if choice.faults else self._compare(decision, choice.worker)
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
        self._spent += self.cpu() - started
        if self._broken >= self.faults:
            self.stop(f"it broke its contract {self._broken} times in a row, last: {why}")
        elif self._spent > max(0.05, self.budget * (now - (self._since or now))):
            self.stop(f"it used {self._spent:.3f} s of CPU in {now - (self._since or now):.1f} s, its budget is {self.budget:.1%}")

    def stop(self, why: str) -> None:
        """Decide no more."""
        self.stopped = why
        log.warning("the shadow stack %s is stopped: %s", self.stack.hash, why)

    def status(self) -> dict[str, object]:
        """For `/debug/fleet`."""
        return {"stack": self.stack.hash, "seen": self.seen, "same": self.same, "other": self.other, "overlap_gain": self.overlap_gain, "stopped": self.stopped}


BACKLOG = 64
"""Decisions that may wait for a shadow; those beyond it are skipped, and counted."""
STUCK = 1.0
"""Seconds after which a shadow that is still at one decision is stopped."""


class Beside:
    """Runs a shadow on a thread: however long it takes, and if it never returns, no request waits for it."""

    def __init__(self, shadow: Shadow, told: Callable[[Verdict], None]) -> None:
        """:param told: each verdict, on that thread."""
        self.shadow = shadow
        self._told = told
        self._waiting: queue.SimpleQueue[Decision | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None

    def follow(self, decision: Decision) -> None:
        """Have it compared, soon. Returns at once."""
        if not self.shadow.wants(decision):
            return
        if (since := self._busy_since) is not None and time.monotonic() - since > STUCK:
            self.shadow.stop(f"it has been at one decision for more than {STUCK:g} s")
        elif self._waiting.qsize() >= BACKLOG:
            self._told("skipped")
        else:
            self._waiting.put(decision)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"shadow stack {self.shadow.stack.hash}", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """What it has not looked at yet, it need not."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (decision := self._waiting.get()) is not None and not self.shadow.stopped:
            self._busy_since = time.monotonic()
            comparison = self.shadow.follow(decision)
            self._busy_since = None
            if comparison is not None:
                self._told(comparison.verdict)
