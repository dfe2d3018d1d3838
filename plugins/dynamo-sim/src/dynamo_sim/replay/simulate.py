"""The replay itself: arrivals, engines and routers, one event after the other, in virtual time."""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import attrs
import numpy as np
from attrs import validators as v
from numpy.typing import NDArray

from dynamo_core.config import Router as RouterConfig
from dynamo_core.errors import NoWorker
from dynamo_core.plugins import Plugins
from dynamo_sim.replay.cache import BlockCache
from dynamo_sim.replay.engine import BlockEngine, Job
from dynamo_sim.replay.fleet import Placed, Routers
from dynamo_sim.replay.trace import Trace
from dynamo_sim.scheduler import Limits
from dynamo_sim.timing import Linear, Polynomial, Roofline, Timing

LOAD_INTERVAL = 100.0
"""Milliseconds between two load reports of a busy worker, as in the engine."""
TIMINGS = ("polynomial", "linear", "roofline")


@attrs.frozen
class Options:
    """What a trace is replayed against; the stack apart."""

    workers: int = attrs.field(default=4, validator=v.ge(1))
    limits: Limits = attrs.field(factory=Limits)
    timing: str = attrs.field(default="polynomial", validator=v.in_(TIMINGS))
    engine_speedup: float = attrs.field(default=1.0, validator=[v.gt(0), v.lt(math.inf)])
    """Steps take so many times less."""
    rate: float = attrs.field(default=1.0, validator=[v.gt(0), v.lt(math.inf)])
    """Arrivals come so many times faster than in the trace."""
    concurrency: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))
    """Closed loop: so many requests are always in progress, and arrival times mean nothing."""
    frontends: int = attrs.field(default=1, validator=v.ge(1))
    share: bool = True
    """Frontends tell each other what they book."""
    event_lag_ms: float = attrs.field(default=0.0, validator=v.ge(0))
    """How late routers hear of what caches store and remove."""
    seed: int = 0
    shared_cache: bool = False
    """All workers use one cache, as large as theirs together: what nobody's placing of prompts can do better than."""

    def make_timing(self) -> Timing:
        match self.timing:
            case "linear":
                return Linear()
            case "roofline":
                return Roofline(self.limits.block_size)
            case _:
                return Polynomial(self.limits.total_blocks)


@attrs.frozen(eq=False)
class Outcome:
    """What happened to each request, in milliseconds of virtual time, and to the workers."""

    arrived: NDArray[np.float64]
    first: NDArray[np.float64]
    """First token; not a number for a request that was refused."""
    done: NDArray[np.float64]
    worker: NDArray[np.int32]
    """-1: refused."""
    cached: NDArray[np.int32]
    """Prompt tokens that the engine had in its cache."""
    predicted: NDArray[np.int32]
    """What the router believed it had."""
    itl: dict[int, int]
    """Tokens by bucket of time since the token before."""
    busy: NDArray[np.float64]
    """Of each worker."""
    preempted: int
    faults: dict[str, int]
    wall_s: float
    """Real time that it took."""


Progress = Callable[[int, float], None]
"""`progress(requests ended, virtual milliseconds)`, now and then."""


def simulate(trace: Trace, config: RouterConfig, plugins: Plugins, options: Options, progress: Progress = lambda ended, now: None) -> Outcome:
    """Replay a trace. The same arguments give the same outcome, but for `wall_s`.

    :raises ConfigError: the stack cannot be built.
    """
    run = _Run(trace, config, plugins, options, progress)
    # Nothing here makes cycles; a collector that walks millions of live objects again and again costs a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return run.run()
    finally:
        if collecting:
            gc.enable()


class _Run:
    def __init__(self, trace: Trace, config: RouterConfig, plugins: Plugins, options: Options, progress: Progress) -> None:
        count, workers = len(trace), options.workers
        self.trace = trace
        self.options = options
        self.progress = progress
        self.size = options.limits.block_size
        self.routers = Routers(config, plugins, workers, options.limits, count=options.frontends, share=options.share, seed=options.seed)
        timing = options.make_timing()
        caches = 1 if options.shared_cache else workers
        self.caches = [BlockCache(options.limits.total_blocks * workers // caches, watched=self.routers.takes_changes) for _ in range(caches)]
        self.engines = [BlockEngine(options.limits, timing, self, self.caches[row % caches], speedup=options.engine_speedup) for row in range(workers)]
        self.arrived = np.full(count, np.nan)
        self.first = np.full(count, np.nan)
        self.done = np.full(count, np.nan)
        self.worker = np.full(count, -1, np.int32)
        self.cached = np.zeros(count, np.int32)
        self.predicted = np.zeros(count, np.int32)
        self.ended = 0
        self.ends: list[tuple[float, int]] = []
        """(end, row): when steps in hand end. An entry that the engine no longer agrees with is stale."""
        self.ready: list[int] = []
        """Rows that begin a step once everything of this moment has happened."""
        self.arrivals: list[tuple[float, int]] = []
        self.turns: dict[int, list[int]] = {}
        """Requests that wait for the end of another."""
        self.news: deque[tuple[float, int, list[tuple[bool, NDArray[np.uint64]]]]] = deque()
        """Changes of caches that routers have not heard of."""
        self.held: dict[int, Job] = {}
        """What waits in the queues of routers."""
        self.reported = [-math.inf] * workers
        self.backlog = iter(range(count))
        """Closed loop: what was not sent yet."""

    def run(self) -> Outcome:
        started = time.perf_counter()
        self._schedule()
        arrivals, ends, engines, routers = self.arrivals, self.ends, self.engines, self.routers
        said = 0
        now = 0.0
        while True:
            while ends and ends[0][0] != engines[ends[0][1]].end:
                heappop(ends)
            later = min(ends[0][0] if ends else math.inf, arrivals[0][0] if arrivals else math.inf)
            if later > now and self.ready:
                self._begin(now)
                continue
            if later == math.inf:
                if self._retry(now):
                    continue
                if not routers.stir():
                    break
                later = now + 1000.0  # all is quiet, and somebody waits: until its time is up
            now = later
            routers.now = now / 1000.0
            if ends and ends[0][0] == now:
                row = heappop(ends)[1]
                engines[row].finish()
                self.ready.append(row)
                self._tell(row, now)
                self._retry(now)
                self._release(now)
            elif arrivals and arrivals[0][0] == now:
                self._arrive(heappop(arrivals)[1], now)
            else:
                self._release(now)
            if self.ended - said >= 1000:
                said = self.ended
                self.progress(said, now)
        self.progress(self.ended, now)
        return self._outcome(time.perf_counter() - started)

    def _schedule(self) -> None:
        trace, options = self.trace, self.options
        after = trace.after
        if after is not None:
            for i in np.flatnonzero(after >= 0).tolist():
                self.turns.setdefault(int(after[i]), []).append(i)
        if options.concurrency is not None:
            self.backlog = iter([i for i in range(len(trace)) if after is None or after[i] < 0])
            for _ in range(options.concurrency):
                self._next(0.0)
        else:
            free = np.arange(len(trace)) if after is None else np.flatnonzero(after < 0)
            self.arrivals = [(float(trace.arrival[i]) / options.rate, int(i)) for i in free]
            heapify(self.arrivals)

    def _next(self, now: float) -> None:
        if (number := next(self.backlog, None)) is not None:
            heappush(self.arrivals, (now, number))

    # -------------------------------------------------------------- events

    def _arrive(self, number: int, now: float) -> None:
        trace, size = self.trace, self.size
        prompt, output = int(trace.prompt[number]), int(trace.output[number])
        self.arrived[number] = now
        names = trace.keys(number, size)
        if prompt + output > self.options.limits.total_blocks * size:
            self._end(number, now)  # no engine could ever take it
            return
        self._hear(now)
        session = -1 if trace.session is None else int(trace.session[number])
        request = self.routers.request(number, names, prompt, size, session)
        job = Job(number, prompt, output, names)
        try:
            placed = self.routers.submit(number, request)
        except NoWorker:
            self._end(number, now)
            return
        if placed is None:
            self.held[number] = job
            self._release(now)  # it may have brought movement into the queue
        else:
            self._place(job, placed, now)

    def _release(self, now: float) -> None:
        """What waited in routers goes where there is room now."""
        self._hear(now)
        for number, placed in self.routers.release():
            job = self.held.pop(number)
            if placed is None:
                self._end(number, now)
            else:
                self._place(job, placed, now)

    def _place(self, job: Job, placed: Placed, now: float) -> None:
        row = placed.row
        self.worker[job.number], self.predicted[job.number] = row, placed.overlap
        engine = self.engines[row]
        if engine.idle:
            self.ready.append(row)
        before = engine.end
        engine.add(job, now)
        if engine.end < before:
            heappush(self.ends, (engine.end, row))

    def _begin(self, now: float) -> None:
        ready, self.ready = self.ready, []
        for row in ready:
            engine = self.engines[row]
            if engine.end == math.inf:
                engine.begin(now)
                if engine.end != math.inf:
                    heappush(self.ends, (engine.end, row))

    def _retry(self, now: float) -> bool:
        """What one worker gave back may be what another waits for, if they share a cache. Returns whether anybody tries again."""
        if not self.options.shared_cache:
            return False
        trying = False
        for row, engine in enumerate(self.engines):
            before = engine.end
            if engine.retry(now):
                trying = True
                if before == math.inf:
                    self.ready.append(row)
                elif engine.end < before:
                    heappush(self.ends, (engine.end, row))
        return trying

    def _tell(self, row: int, now: float) -> None:
        """What a worker publishes at the end of a step."""
        engine = self.engines[row]
        if self.routers.takes_changes and (changes := engine.cache.drain()):
            holders = range(len(self.engines)) if self.options.shared_cache else (row,)
            self.news.extend((now + self.options.event_lag_ms, holder, changes) for holder in holders)
        if self.routers.takes_load and (engine.idle or now - self.reported[row] >= LOAD_INTERVAL):
            self.reported[row] = now
            self.routers.reported(row, engine.load())

    def _hear(self, now: float) -> None:
        news = self.news
        while news and news[0][0] <= now:
            _, row, changes = news.popleft()
            self.routers.changed(row, changes)

    def _end(self, number: int, now: float) -> None:
        self.ended += 1
        for turn in self.turns.pop(number, ()):
            heappush(self.arrivals, (now + float(self.trace.arrival[turn]), turn))
        if self.options.concurrency is not None:
            self._next(now)

    # -------------------------------------------------------------- what engines say

    def first_token(self, job: Job, now: float) -> None:
        number = job.number
        self.first[number] = now
        self.cached[number] = job.cached
        self.routers.first_token(number, int(self.worker[number]), job.cached)

    def grew(self, job: Job, tokens: int, now: float) -> None:
        self.routers.grew(job.number, int(self.worker[job.number]), tokens)

    def finished(self, job: Job, now: float) -> None:
        number = job.number
        self.done[number] = now
        self.routers.finished(number, int(self.worker[number]))
        self._end(number, now)

    def _outcome(self, wall_s: float) -> Outcome:
        itl: dict[int, int] = {}
        for engine in self.engines:
            for slot, tokens in engine.itl.items():
                itl[slot] = itl.get(slot, 0) + tokens
        return Outcome(
            self.arrived, self.first, self.done, self.worker, self.cached, self.predicted, itl, np.array([engine.busy for engine in self.engines]),
            sum(engine.preempted for engine in self.engines), self.routers.faults(), wall_s,
        )
