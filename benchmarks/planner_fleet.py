"""A fleet in virtual time that the planner scales through its own contracts: prompts queue for who reads, sequences share who decodes.

Prompts are read first come, first served, one at a time on each replica. Sequences that decode are spread evenly; each step takes what the
engine's timing model says for so many of them, so that all slow down together. Where the same replicas do both, what they read in a second is
lost for decoding, and the first token takes a step more. A second is a step of the simulation; arrivals are spread
over it. New replicas serve after the cold start. Replicas that are taken away stop taking prompts at once and finish what they have.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import attrs
import numpy as np

from benchmarks.planner_loads import Day
from dynamo_core.scaling import RoleState
from dynamo_planner.contract import Load, WorkerReport
from dynamo_planner.performance.profile import DecodePoint, PrefillPoint, Profile
from dynamo_sim.timing import Polynomial

BLOCKS, BLOCK = 16_384, 64
TIMING = Polynomial(BLOCKS)


def prefill_seconds(tokens: float) -> float:
    return TIMING.step_ms(int(tokens), 0, 0.0) / 1000


def itl_seconds(context: float, sequences: float) -> float:
    """With more than fits in the cache, sequences take turns."""
    blocks = max(1.0, sequences) * context / BLOCK
    return TIMING.step_ms(0, 1, min(blocks, BLOCKS)) / 1000 * max(1.0, blocks / BLOCKS)


def profile() -> Profile:
    """What `dynamo profile` would find."""
    contexts, batches = (1024, 4096, 8192, 12288), (1, 4, 8, 16, 32, 64, 96, 128)
    return Profile(
        prefill=tuple(PrefillPoint(n, prefill_seconds(n)) for n in (256, 1024, 4096, 8192, 12288, 32768, 65536, 131072)),
        decode=tuple(DecodePoint(c, n, itl_seconds(c, n)) for c in contexts for n in batches if c * n <= BLOCKS * BLOCK),
        max_sequences=256, kv_tokens=BLOCKS * BLOCK,
    )


@attrs.define
class _Pool:
    ready: int
    starting: list[float] = attrs.field(factory=list)
    """When each will be ready."""
    changes: list[tuple[float, int]] = attrs.field(factory=list)
    """Time and desired count of each write."""

    @property
    def desired(self) -> int:
        return self.ready + len(self.starting)


@attrs.define(eq=False)
class SimulatedFleet:
    """A connector, a source of load and a source of reports, all of the same fleet. `advance` lets time pass."""

    day: Day
    ttft: float
    itl: float
    cold_start: float
    roles: Sequence[str] = ("prefill", "decode")
    """Or `aggregated` alone."""
    pools: dict[str, _Pool] = attrs.field(init=False)
    now: int = 0
    gpu_seconds: float = 0.0
    served: int = 0
    on_time: int = 0
    late_first: int = 0
    late_between: int = 0
    _servers: list[float] = attrs.field(init=False)
    """When each replica that reads prompts will be free."""
    _reading: dict[int, float] = attrs.field(factory=dict)
    """By second, the time that replicas spend on prompts then, where that is lost for decoding."""
    _joining: dict[int, list[tuple[float, float, bool]]] = attrs.field(factory=dict)
    """By second, the sequences that start to decode then: when, how many tokens, and whether the first was in time."""
    _decoding: list[tuple[float, float, float, bool]] = attrs.field(factory=list)
    """Finish line on the common track, start, tokens, first token in time."""
    _track: float = 0.0
    _speed: float = 0.0
    """Tokens of each sequence in the last second."""
    _seen: dict[str, float] = attrs.field(factory=lambda: dict.fromkeys(("at", "arrived", "prompt", "squares", "output", "ttft", "first", "itl", "ended"), 0.0))

    def __attrs_post_init__(self) -> None:
        self.start_with(dict.fromkeys(self.roles, 2))

    @property
    def _readers(self) -> _Pool:
        return self.pools[self.roles[0]]

    @property
    def _decoders(self) -> _Pool:
        return self.pools[self.roles[-1]]

    # -------------------------------------------------------------- time

    def advance(self, seconds: int) -> None:
        for _ in range(seconds):
            self._second()

    def _second(self) -> None:
        t = self.now
        for name, pool in self.pools.items():
            while pool.starting and pool.starting[0] <= t:
                heapq.heappop(pool.starting)
                pool.ready += 1
                if name == self.roles[0]:
                    heapq.heappush(self._servers, float(t))
            self.gpu_seconds += pool.ready + len(pool.starting)
        self._decode(t)
        self._prefill(t)
        self.now += 1

    def _prefill(self, t: int) -> None:
        arriving = self.day.requests(t)
        seen, servers = self._seen, self._servers
        both = len(self.roles) == 1
        step = itl_seconds(float(self.day.prompt[t]), len(self._decoding) / max(1, self._decoders.ready)) if both else 0.0
        for i, (prompt, output) in enumerate(arriving):
            work = prefill_seconds(prompt)
            at = t + (i + 0.5) / len(arriving)
            if servers:
                first = max(at, servers[0]) + work
                heapq.heapreplace(servers, first)
            else:  # nobody is there: it waits for the next replica
                ready = self._readers.starting
                first = (ready[0] if ready else at + 600.0) + work
            if both:
                self._reads(first - work, first)
                first += step
            waited = first - at
            seen["arrived"] += 1
            seen["prompt"] += prompt
            seen["squares"] += prompt**2
            seen["output"] += output
            seen["ttft"] += waited
            seen["first"] += 1
            self._joining.setdefault(int(first) + 1, []).append((first, output, waited <= self.ttft))

    def _reads(self, start: float, end: float) -> None:
        while start < end:
            second = int(start)
            part = min(end, second + 1) - start
            self._reading[second] = self._reading.get(second, 0.0) + part
            start = second + 1

    def _decode(self, t: int) -> None:
        decoding, pool = self._decoding, self._decoders
        read, before, speed = self._reading.pop(t, 0.0), self._track, self._speed
        context = float(self.day.prompt[t] + self.day.output[t] / 2)
        for first, tokens, in_time in self._joining.pop(t, ()):  # since the second before
            began = before - (t - first) * (speed or 1 / itl_seconds(context, 1.0))
            heapq.heappush(decoding, (began + tokens, first, tokens, in_time))
        if not decoding or not pool.ready:
            self._speed = 0.0
            return
        self._speed = max(0.0, 1.0 - read / pool.ready) / itl_seconds(context, len(decoding) / pool.ready)
        self._track += self._speed
        while decoding and decoding[0][0] <= self._track:
            line, first, tokens, in_time = heapq.heappop(decoding)
            pace = self._speed if line > before else speed or 1 / itl_seconds(context, 1.0)
            between = max(0.0, t + (line - before) / pace - first) / tokens
            self._seen["itl"] += between * tokens
            self._seen["ended"] += tokens
            self.served += 1
            self.late_first += not in_time
            self.late_between += between > self.itl
            self.on_time += in_time and between <= self.itl

    # -------------------------------------------------------------- a connector

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def observe(self) -> Mapping[str, RoleState]:
        return {name: RoleState(desired=pool.desired, ready=pool.ready, starting=len(pool.starting), draining=0, gpus_per_replica=1, stable=not pool.starting)
                for name, pool in self.pools.items()}

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        for name, count in targets.items():
            pool = self.pools[name]
            pool.changes.append((self.now, count))
            while pool.desired < count:
                heapq.heappush(pool.starting, self.now + self.cold_start)
            while pool.desired > count:
                if pool.starting:
                    pool.starting.remove(max(pool.starting))
                    continue
                pool.ready -= 1
                if name == self.roles[0]:
                    heapq.heappop(self._servers)

    # -------------------------------------------------------------- a source of load, and of reports

    async def load(self, at: float) -> Load | None:
        seen, self._seen = self._seen, dict.fromkeys(self._seen, 0.0) | {"at": at}
        if (seconds := at - seen["at"]) <= 0:
            return None
        n = max(1.0, seen["arrived"])
        return Load(at, seconds, seen["arrived"] / seconds, seen["prompt"] / n, seen["output"] / n, in_progress=float(len(self._decoding)),
                    ttft=seen["ttft"] / seen["first"] if seen["first"] else None, itl=seen["itl"] / seen["ended"] if seen["ended"] else None,
                    prompt_spread=max(0.0, seen["squares"] * n / seen["prompt"] ** 2 - 1) if seen["prompt"] else 0.0)

    def reports(self, at: float) -> Sequence[WorkerReport]:
        prompt = float(self.day.prompt[min(self.now, self.day.prompt.size - 1)])
        backlog = sum(max(0.0, free - self.now) for free in self._servers) / prefill_seconds(prompt) * prompt if self._servers else 0.0
        readers, decoders = self._readers.ready, self._decoders.ready
        running = len(self._decoding) / max(1, decoders)
        share = min(1.0, running * prompt / (BLOCKS * BLOCK))
        waiting = max(0, int(backlog / max(1, readers) - prompt))
        busy = partial(WorkerReport, running=round(running), kv_share=share, slots=256, at=at)
        if len(self.roles) == 1:
            return [busy(f"a{i}", self.roles[0], waiting_prefill_tokens=waiting) for i in range(readers)]
        return [WorkerReport(f"p{i}", "prefill", waiting_prefill_tokens=waiting, at=at) for i in range(readers)] + [
            busy(f"d{i}", "decode") for i in range(decoders)]

    def problems(self) -> Sequence[str]:
        return ()

    # -------------------------------------------------------------- what came of it

    def start_with(self, replicas: Mapping[str, int]) -> None:
        """Before time begins: so many replicas, all of them ready."""
        self.pools = {name: _Pool(count) for name, count in replicas.items()}
        self._servers = [0.0] * replicas[self.roles[0]]

    def unfinished(self) -> int:
        """Requests that the day's end finds unanswered."""
        return len(self._decoding) + sum(map(len, self._joining.values()))

    def turns(self, within: float) -> int:
        return sum(turns(pool.changes, within) for pool in self.pools.values())


def turns(changes: Sequence[tuple[float, int]], within: float) -> int:
    """Changes of direction within so many seconds: a replica was added and taken away again, or the other way round. :param changes: time and count of each."""
    found = way = 0
    for (before, old), (at, count) in pairwise(changes):
        turned = int(np.sign(count - old)) or way
        found += bool(way and turned != way and at - before <= within)
        way = turned
    return found
