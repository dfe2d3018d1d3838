"""The scheduler of the simulated engine for virtual time: the same rules as `dynamo_sim.scheduler`, at the level of blocks.

Between two events (an arrival, a block that fills up, an answer that ends) steps that only decode differ in nothing but the growing context, so
they are taken in one go, in closed form. A step costs the same whether one sequence decodes or two hundred: each sequence knows the number of the
decode pass at which something happens to it next, and a heap knows the first.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from dynamo_core.types import Load
from dynamo_sim.replay.cache import BlockCache
from dynamo_sim.scheduler import Limits
from dynamo_sim.timing import Timing


@attrs.define(eq=False, slots=True)
class Job:
    """One request in an engine."""

    number: int
    """Of the request in its trace."""
    prompt: int
    """Tokens."""
    output: int
    """Tokens to generate, at least 1."""
    names: NDArray[np.uint64]
    """Keys of the full blocks of the prompt."""
    keys: list[int] = attrs.field(init=False, factory=list)
    """The same as Python integers, from admission to the end."""
    generated: int = 0
    """Tokens; while it decodes, see `base` instead."""
    computed: int = 0
    blocks: int = 0
    """KV blocks that it uses."""
    base: int = 0
    """The decode pass before its first token, so that pass p brings token p - base."""
    cached: int = -1
    """Prompt tokens that were in the cache when it was first admitted; -1 before."""
    preemptions: int = 0
    decoding: bool = False


class Watcher(Protocol):
    """Who wants to know what happens in an engine. `now` is in milliseconds."""

    def first_token(self, job: Job, now: float) -> None: ...

    def grew(self, job: Job, tokens: int, now: float) -> None:
        """The output filled another block."""
        ...

    def finished(self, job: Job, now: float) -> None: ...


class BlockEngine:
    """One worker. The caller lets time pass: `begin` says when the steps in hand end, and `finish` is called then."""

    def __init__(self, limits: Limits, timing: Timing, watcher: Watcher, cache: BlockCache, *, speedup: float = 1.0) -> None:
        """:param cache: its own, or one that it shares; then see `retry`."""
        if limits.max_batched_tokens < limits.max_sequences:
            raise ValueError(f"max_batched_tokens ({limits.max_batched_tokens}) must be at least max_sequences ({limits.max_sequences})")
        self.cache = cache
        self.end = math.inf
        """When the steps in hand end, in milliseconds; infinite while it is idle."""
        self.busy = 0.0
        """Milliseconds of work so far."""
        self.preempted = 0
        self.itl: dict[int, int] = {}
        """Tokens by time since the token before, in buckets (`bucket`)."""
        self._limits = limits
        self._timing = timing
        self._watcher = watcher
        self._speed = speedup
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, None] = {}
        """In order of admission."""
        self._reading: dict[Job, None] = {}
        """Those that are not through with their prompt. They were admitted after all that decode."""
        self._through: list[Job] = []
        """Those that get through in the step in hand."""
        self._decoding = 0
        self._context = 0
        """Tokens that the decoding sequences attend to, in all."""
        self._passes = 0
        self._agenda: list[tuple[int, int, int, Job]] = []
        """(decode pass, request number, preemptions, sequence): the next thing that happens to each decoding sequence."""
        self._blocked = False
        """The first that waits cannot start before something ends."""
        self._start = 0.0
        self._ahead = 0
        """Decode passes in hand."""

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def load(self) -> Load:
        waiting = sum(job.prompt + job.generated for job in self._waiting)
        total = self._limits.total_blocks
        return Load(len(self._running), len(self._waiting), self.cache.used * total // self.cache.total, total, waiting)

    def add(self, job: Job, now: float) -> None:
        """Queue a request. The caller calls `begin` if the engine was idle; otherwise `end` may have come nearer."""
        if not self._limits.prefix_caching:
            job.names = job.names[:0]
        job.keys = job.names.tolist()
        self._waiting.append(job)
        if self._ahead > 1 and not self._blocked:
            self._cut(now)

    def retry(self, now: float) -> bool:
        """Others gave back blocks of a shared cache. Returns whether something waits here that may start with them; then see `add`."""
        if not self._blocked or not self._waiting:
            return False
        self._blocked = False
        if self._ahead > 1:
            self._cut(now)
        return True

    def _cut(self, now: float) -> None:
        """End the steps in hand with the one that is under way: something waits."""
        low, high = 0, self._ahead
        while high - low > 1:
            middle = (low + high) >> 1
            if self._start + self._decode_ms(middle) >= now:
                high = middle
            else:
                low = middle
        self._ahead = high
        self.end = self._start + self._decode_ms(high)

    def _decode_ms(self, steps: int) -> float:
        size = self._limits.block_size
        return self._timing.decode_ms(self._decoding, self._context / size, self._decoding / size, steps) / self._speed

    # -------------------------------------------------------------- steps

    def begin(self, now: float) -> None:
        """Start the next step, or as many as nothing can come between. Sets `end`."""
        self._start = now
        self._ahead = 1
        if not self._reading and (not self._waiting or self._blocked) and self._decoding:
            self._jump()
            return
        tokens, attention = self._read_on()
        if not tokens and not self._decoding:
            self.end, self._ahead = math.inf, 0
            return
        if not self._decoding:
            self._ahead = 0
        elif not tokens:
            self._jump()
            return
        size = self._limits.block_size
        self.end = now + self._timing.step_ms(tokens, self._decoding, self._context / size, attention) / self._speed

    def _jump(self) -> None:
        agenda = self._agenda
        while (entry := agenda[0])[2] != entry[3].preemptions:
            heappop(agenda)
        self._ahead = entry[0] - self._passes
        self.end = self._start + self._decode_ms(self._ahead)

    def finish(self) -> None:
        """The steps in hand are over: hand out what they made."""
        now, duration = self.end, self.end - self._start
        self.busy += duration
        if ahead := self._ahead:
            tokens = ahead * self._decoding
            slot = bucket(duration / ahead)
            self.itl[slot] = self.itl.get(slot, 0) + tokens
            self._passes += ahead
            self._context += tokens
        self.end, self._ahead = math.inf, 0
        through, self._through = self._through, []
        for job in through:
            if job in self._reading and job.computed >= job.prompt + job.generated:
                self._start_decoding(job, now)
        agenda, passes = self._agenda, self._passes
        while agenda and agenda[0][0] <= passes:
            _, _, preemptions, job = heappop(agenda)
            if preemptions == job.preemptions:
                self._event(job, now)

    def _start_decoding(self, job: Job, now: float) -> None:
        del self._reading[job]
        generated = job.generated + 1
        job.base = self._passes - generated
        job.decoding = True
        self._decoding += 1
        self._context += job.prompt + generated
        if generated == 1:
            self._watcher.first_token(job, now)
        self._event(job, now)

    def _event(self, job: Job, now: float) -> None:
        """A decoding sequence ends, or needs a block for its newest token, or has only begun."""
        generated = self._passes - job.base
        if generated >= job.output:
            self._leave(job, generated)
            size = self._limits.block_size
            held = min(job.blocks, len(job.keys))
            full = (job.prompt + generated) // size - len(job.keys)
            private = job.blocks - held
            self.cache.release(job.keys, job.names, held, private, min(private, full))
            job.keys = []
            job.generated = generated
            self._blocked = False
            self._watcher.finished(job, now)
            return
        size = self._limits.block_size
        if job.prompt + generated > job.blocks * size:
            while not self.cache.take((), job.names, 0, 0, 1):
                if self._preempt() is job:
                    return
            job.blocks += 1
            if generated > 1:
                self._watcher.grew(job, generated, now)
        due = min(job.output, job.blocks * size - job.prompt + 1)
        heappush(self._agenda, (job.base + due, job.number, job.preemptions, job))

    def _leave(self, job: Job, generated: int) -> None:
        del self._running[job]
        job.decoding = False
        self._decoding -= 1
        self._context -= job.prompt + generated

    def _preempt(self) -> Job:
        """The newest running sequence gives up its blocks, and is computed again later."""
        job = next(reversed(self._running)) if self._limits.preemption == "lifo" else next(iter(self._running))
        if job.decoding:
            job.generated = self._passes - job.base
            self._leave(job, job.generated)
        else:
            del self._running[job], self._reading[job]
        held = min(job.blocks, len(job.keys))
        self.cache.release(job.keys, job.names, held, job.blocks - held, 0)
        job.blocks = job.computed = 0
        job.preemptions += 1
        self.preempted += 1
        self._waiting.appendleft(job)
        self._blocked = False
        return job

    # -------------------------------------------------------------- prompts

    def _read_on(self) -> tuple[int, float]:
        """Spend the budget of one step on prompts. Returns how many tokens, and how many each attends to in all."""
        budget = self._limits.max_batched_tokens - self._decoding
        size = self._limits.block_size
        tokens, attention, preempted = 0, 0.0, self.preempted
        for job in tuple(self._reading):
            if not budget:
                break
            if job not in self._reading:
                continue  # preempted a moment ago
            count = min(job.prompt + job.generated - job.computed, budget)
            blocks = -(-(job.computed + count) // size)
            while blocks > job.blocks and not self._more(job, blocks):
                if self._preempt() is job:
                    break
            if job not in self._reading:
                continue
            attention += count * (job.computed + count / 2)
            tokens += count
            budget -= count
            self._compute(job, count)
        if preempted == self.preempted or not (tokens or self._decoding):
            more, attended = self._admit(budget)
            return tokens + more, attention + attended
        return tokens, attention

    def _admit(self, budget: int) -> tuple[int, float]:
        size, cache = self._limits.block_size, self.cache
        tokens, attention = 0, 0.0
        while self._waiting and budget > 0 and not self._blocked:
            if len(self._running) >= self._limits.max_sequences:
                self._blocked = True
                break
            job = self._waiting[0]
            cached = cache.depth(job.keys, (job.prompt - 1) // size) * size
            count = min(job.prompt + job.generated - cached, budget)
            job.blocks = 0
            if count < job.prompt + job.generated - cached and not self._limits.chunked_prefill:
                break
            if not self._more(job, -(-(cached + count) // size)):
                self._blocked = True
                break
            self._waiting.popleft()
            if job.cached < 0:
                job.cached = cached
            job.computed = cached
            self._running[job] = self._reading[job] = None
            attention += count * (cached + count / 2)
            tokens += count
            budget -= count
            self._compute(job, count)
        return tokens, attention

    def _more(self, job: Job, blocks: int) -> bool:
        """Let the sequence have `blocks` blocks in all."""
        full = len(job.keys)
        private = max(0, blocks - max(full, job.blocks))
        if not self.cache.take(job.keys, job.names, min(job.blocks, full), min(blocks, full), private):
            return False
        job.blocks = blocks
        return True

    def _compute(self, job: Job, count: int) -> None:
        job.computed += count
        if job.computed >= job.prompt + job.generated:
            self._through.append(job)


BUCKETS = 200
"""Buckets for each factor of e: half a per cent wide."""


def bucket(ms: float) -> int:
    return math.floor(math.log(ms) * BUCKETS) if ms > 0 else -10_000


def bucket_ms(bucket: int) -> float:
    """The middle of a bucket, in milliseconds."""
    return math.exp((bucket + 0.5) / BUCKETS)
