"""The fact provider `kv-index`: how much of a prompt each worker holds, by tier, and how far to believe it.

A worker whose card promises KV events is followed by them; what it was sent counts as present for `predict` seconds, until its events say so.
One that does not, or whose events fail it (*degraded*), is taken to hold what it was sent, for `ttl` seconds and up to the size of its cache.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import msgspec
import numpy as np
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.ending import ended
from dynamo_core.engines.contract import KvEvent
from dynamo_core.errors import DynamoError
from dynamo_core.kv import Chains, Change, Hasher
from dynamo_core.kv.hashing import Keys
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.kv.wire import decode_news, encode
from dynamo_core.routing.contract import Fact, RoutingRequest, Surroundings, Worker
from dynamo_core.routing.facts import OVERLAP_TOKENS
from dynamo_core.types import Instance
from dynamo_kv_router.facts import INDEX_AGE, INDEX_PROBLEM, INDEX_STATE, OVERLAPS, PREDICTED_TOKENS
from dynamo_kv_router.grain import Grain
from dynamo_kv_router.index import SENT, Index
from dynamo_kv_router.keys import LOCAL_SECRET, hasher_for, keys_of
from dynamo_kv_router.recent import Recent
from dynamo_kv_router.source import Source
from dynamo_kv_router.store import Choice, kind_of

log = logging.getLogger(__name__)

ENDPOINT = "kv_state"
ASK_TIMEOUT = 15.0
ASK_AT_ONCE = 8
"""Workers that are asked for their picture at the same time."""
STEP = 4096
"""Keys of an answer that are taken in before other work has its turn."""
_TOLD = 12_000
"""Keys in one message to a new frontend, about."""
_NOBODY = 1 << 20
"""Blocks that a worker can hold whose card does not say."""

_encode_sent = msgspec.msgpack.Encoder().encode
_decode_sent = msgspec.msgpack.Decoder(tuple[int, int, list[tuple[int, int, float, bytes]]]).decode

Columns = Mapping[Fact[Any], Sequence[Any]]


def _installed(_: object, attribute: object, store: Choice) -> None:
    kind_of(store)


@attrs.define(eq=False)
class KvIndex:
    """Options of the provider. Its state follows the fleet of one router."""

    mode: Literal["auto", "events", "approximate"] = attrs.field(default="auto", validator=v.in_(["auto", "events", "approximate"]))
    """`auto`: by events where a worker's card promises them. `events` expects them of every worker. `approximate` uses none."""
    ttl: float = attrs.field(default=120.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds for which a worker without events is taken to hold what it was sent."""
    predict: float = attrs.field(default=5.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds for which a worker with events is taken to hold what it was sent, before its events say so; 0 turns it off."""
    limit: int = attrs.field(default=8_000_000, validator=v.ge(1024))
    """Blocks to know, of all workers together, about 90 bytes each, 30 in the compiled store; the oldest are forgotten beyond it."""
    every: int = attrs.field(default=0, validator=v.ge(0))
    """Tokens for which the index keeps one key, in whole blocks; 0 keeps each block. 64 with blocks of 16 takes a quarter of the memory and
    half of the work, and overlaps are rounded down to 64 tokens."""
    store: Choice = attrs.field(default="auto", validator=[v.in_(["auto", "python", "native"]), _installed])
    """Where the index keeps its keys: `python`, or `native`, compiled, where `dynamo-kv-native` is installed. `auto` takes the latter where it can."""
    silence: float = attrs.field(default=5.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds without a sign of life after which a worker that should publish events counts as degraded."""

    provides = (*OVERLAPS, PREDICTED_TOKENS, INDEX_STATE, INDEX_PROBLEM, INDEX_AGE)
    topics = ("kv",)
    clock: Callable[[], float] = attrs.field(default=time.monotonic, init=False, repr=False)
    hasher: Hasher = attrs.field(init=False, repr=False)
    index: Index = attrs.field(init=False, repr=False)
    _grain: Grain = attrs.field(init=False, repr=False)
    _recent: Recent = attrs.field(init=False, repr=False)
    _secret: bytes = attrs.field(init=False, repr=False, default=LOCAL_SECRET)
    _sources: dict[Worker, Source] = attrs.field(init=False, repr=False, factory=dict[Worker, Source])
    _rooms: dict[Worker, int] = attrs.field(init=False, repr=False, factory=dict[Worker, int])
    _chains: dict[Worker, Chains] = attrs.field(init=False, repr=False, factory=dict[Worker, Chains])
    _still: dict[Fact[Any], Sequence[Any]] = attrs.field(init=False, repr=False, factory=dict[Fact[Any], Sequence[Any]])
    """Columns that stay as they are until a worker comes, goes, or changes its state."""
    _still_for: Sequence[Worker] | None = attrs.field(init=False, repr=False, default=None)
    _aged: float = attrs.field(init=False, repr=False, default=-math.inf)
    _surroundings: Surroundings | None = attrs.field(init=False, repr=False, default=None)
    _tasks: set[asyncio.Task[None]] = attrs.field(init=False, repr=False, factory=set[asyncio.Task[None]])
    _turn: asyncio.Semaphore = attrs.field(init=False, repr=False, factory=lambda: asyncio.Semaphore(ASK_AT_ONCE))

    def __attrs_post_init__(self) -> None:
        self._name_by(self._secret, 16)

    # -------------------------------------------------------------- the fleet

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        if not self._sources and card.block_size != self.hasher.block_size:
            self._name_by(self._secret, card.block_size)
        publishes = self.mode == "events" or (self.mode == "auto" and card.kv_events)
        self._rooms[worker] = card.total_blocks or _NOBODY
        known = self._sources.get(worker)
        if known is None or known.publishes != publishes:
            source = self._sources[worker] = Source(worker, instance, publishes, since=self.clock())
            if publishes and card.block_size != self.hasher.block_size:
                source.refused = f"it has blocks of {card.block_size} tokens, and other workers of the model have {self.hasher.block_size}"
            self._admit(source)
            self._ask(source)
        else:
            known.instance = instance
        self._still_for = None

    def left(self, worker: Worker) -> None:
        self._sources.pop(worker, None)
        self._rooms.pop(worker, None)
        self._chains.pop(worker, None)
        self.index.drop_worker(worker)
        self._recent.drop_worker(worker)
        self._still_for = None

    def _admit(self, source: Source) -> None:
        self.index.join(source.worker)
        room = self._rooms.get(source.worker, _NOBODY) // self._grain.blocks
        self._recent.join(source.worker, self.predict if source.publishes and not source.degraded else self.ttl, room)

    def _name_by(self, secret: bytes, block_size: int) -> None:
        """From now on keys are these; what was known under others is of no use."""
        self._secret, self.hasher = secret, hasher_for(secret, block_size)
        self._grain = Grain(self.every, block_size)
        self.index = Index(self.limit, store=self.store)
        self._recent = Recent(self.index, self.limit)
        self._chains.clear()
        for source in self._sources.values():
            source.forget()
            self._admit(source)

    # -------------------------------------------------------------- the question

    def keys(self, request: RoutingRequest) -> Keys:
        """The keys of the prompt's full blocks."""
        return keys_of(self.hasher, request)

    def named(self, request: RoutingRequest) -> Sequence[int]:
        """For other frontends, which then know that this worker was sent these blocks."""
        if self._surroundings is None:
            return ()  # Keys of this process alone mean nothing elsewhere.
        return Prehashed(self.keys(request), request.prompt_tokens or len(request.token_ids), self.hasher.block_size, self.hasher.fingerprint)

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Columns:
        now = self.clock()
        if workers is not self._still_for:
            self._refresh(workers)
        if now - self._aged > 0.1:
            self._aged = now
            self._still[INDEX_AGE] = tuple([now - s.heard if s else math.inf for s in map(self._sources.get, workers)])
        size = self._grain.tokens
        # An engine computes at least the last token, so that a block that would hold it is of no use.
        keys = self._grain.of_prompt(self.keys(request)[: max(0, len(request.token_ids) - 1) // self.hasher.block_size])
        if not len(keys):
            return self._still
        self._recent.expire(now)
        columns: dict[Fact[Any], Any] = dict(self._still)
        reached = self.index.depths(keys, workers)
        if len(self._recent):
            likely = self.index.depths(keys, workers, sent=True)
            columns[PREDICTED_TOKENS] = (likely - reached) * size
            reached = likely
        columns[OVERLAP_TOKENS] = reached * size
        for level in self.index.levels:
            if 0 < level < SENT:
                deeper = self.index.depths(keys, workers, level, sent=True)
                columns[OVERLAPS[level]] = (deeper - reached) * size
                reached = deeper
        return columns

    def _refresh(self, workers: Sequence[Worker]) -> None:
        """Columns that change rarely; records share them."""
        sources = [self._sources.get(worker) for worker in workers]
        now = self.clock()
        problems = tuple([s.problem(now, self.silence) if s else "" for s in sources])
        nothing = (0,) * len(workers)
        self._still = dict.fromkeys((*OVERLAPS, PREDICTED_TOKENS), nothing)
        self._still |= {INDEX_PROBLEM: problems, INDEX_STATE: tuple([_state(s) for s in sources])}
        self._still_for, self._aged = workers, -math.inf

    # -------------------------------------------------------------- what was sent

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        if (source := self._sources.get(worker)) is not None:
            keys = self._grain.of_prompt(self.keys(request))
            if source.publishes and not source.degraded:
                keys = keys[self.index.depth(worker, keys) :] if self.predict else keys[:0]
            self._recent.record(worker, keys, self.clock())

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None: ...

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None: ...

    def state(self) -> Sequence[bytes]:
        """What workers were sent that tell nothing themselves; a new frontend can learn it from nobody else."""
        now, found, parts, room = self.clock(), list[bytes](), list[tuple[int, int, float, bytes]](), _TOLD
        for source in self._sources.values():
            if source.publishes and not source.degraded:
                continue
            for at, keys in self._recent.chains(source.worker):
                if room <= 0:
                    found.append(_encode_sent((self.hasher.fingerprint, self._grain.tokens, parts)))
                    parts, room = [], _TOLD
                parts.append((source.worker.instance, source.worker.dp_rank, now - at, keys.astype("<u8", copy=False).tobytes()))
                room -= len(keys)
        return [*found, _encode_sent((self.hasher.fingerprint, self._grain.tokens, parts))] if parts else found

    def learn(self, message: bytes) -> None:
        """:raises msgspec.MsgspecError: it is something else."""
        fingerprint, grain, parts = _decode_sent(message)
        now = self.clock()
        for instance, rank, age, raw in parts if (fingerprint, grain) == (self.hasher.fingerprint, self._grain.tokens) else ():
            source = self._sources.get(Worker(instance, rank))
            if source is not None and (not source.publishes or source.degraded) and age < self.ttl:
                self._recent.record(source.worker, np.frombuffer(raw, "<u8").astype(np.uint64, copy=False), now - max(0.0, age))

    # -------------------------------------------------------------- what workers say

    def feed(self, worker: Worker, events: Sequence[KvEvent]) -> None:
        """Events from an engine itself, without a wire between: for replay in virtual time, and for tests."""
        if (chains := self._chains.get(worker)) is None:
            chains = self._chains[worker] = Chains(self.hasher)
        self.apply(worker, chains.apply(events))

    def apply(self, worker: Worker, changes: Sequence[Change]) -> None:
        """What `feed` comes to, for callers who know blocks by keys alone."""
        if (source := self._sources.get(worker)) is None:
            return
        if not source.whole:
            source.whole, self._still_for = True, None
        source.heard = self.clock()
        for change in self._grain.of_changes(changes):
            self.index.apply(worker, change)

    def on_event(self, topic: str, publisher: int, payload: bytes) -> None:
        news = decode_news(payload)
        source = self._sources.get(Worker(publisher, news.dp_rank))
        if source is None or not source.publishes:
            return
        if self._surroundings is None and news.secret != self.hasher.fingerprint:
            return  # The fleet's secret is not known yet. Whatever is missed now is asked for when it is.
        before = (source.reported, source.refused)
        try:
            changes = source.take(news, self.clock(), self.hasher)
        except ValueError:
            source.forget()
            raise
        for change in self._grain.of_changes(changes):
            self.index.apply(source.worker, change)
        if source.degraded or before != (source.reported, source.refused):
            self._look(source)
        if source.lost and not source.refused:
            self._ask(source)

    def on_gap(self, topic: str, publisher: int, missed: int) -> None:
        """The numbers of the news themselves say what is missing, of which rank."""

    def _look(self, source: Source) -> None:
        """Bring its state up to date: degraded or healed."""
        problem = source.problem(self.clock(), self.silence)
        if bool(problem) != source.degraded:
            source.degraded = bool(problem)
            if problem:
                log.warning("worker %s is routed by what it was sent, and not by its KV events: %s", source.instance.label, problem)
                source.forget()
                self._clear(source)
            else:
                log.warning("worker %s is routed by its KV events again", source.instance.label)
                self._ask(source)
            self._admit(source)
            self._still_for = None

    def _clear(self, source: Source) -> None:
        self.index.clear(source.worker)
        self._recent.restore(source.worker)

    def status(self) -> dict[str, Any]:
        """Of the index as a whole, for people: which store it is in, and how much of it there is."""
        return {"store": self.index.kind.name, "blocks": len(self.index), "forgotten": self.index.forgotten}

    def problems(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for source in self._sources.values():
            self._look(source)
            if source.degraded:
                rank = f"/{source.worker.dp_rank}" if source.worker.dp_rank else ""
                found[f"kv {source.instance.label}{rank}"] = source.problem(self.clock(), self.silence)
        return found

    # -------------------------------------------------------------- asking, where there is a fleet

    async def attach(self, surroundings: Surroundings) -> None:
        secret = await surroundings.secret("kv")
        if secret != self._secret:
            self._name_by(secret, self.hasher.block_size)
        self._surroundings = surroundings
        self._still_for = None
        log.info("the KV index of %s is kept by the %s store", surroundings.model, self.index.kind.name)
        now = self.clock()
        for source in self._sources.values():
            source.since = now
            self._ask(source)
        self._start(self._watch())

    async def detach(self) -> None:
        self._surroundings = None
        tasks, self._tasks = self._tasks, set()
        await ended(*tasks)
        for source in self._sources.values():
            source.asking = False

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Silence makes no noise: look at everybody now and then."""
        while True:
            await asyncio.sleep(min(1.0, self.silence / 4))
            for source in list(self._sources.values()):
                self._look(source)
            # Requests forget a little of what is too old; here goes what they left, as after a quiet hour.
            while await asyncio.sleep(0, self._recent.expire(self.clock())):
                pass
            self.index.tidy(8)

    def _ask(self, source: Source) -> None:
        if source.publishes and not source.asking and self._surroundings is not None:
            source.asking = True
            self._start(self._fetch(source, self._surroundings))

    async def _fetch(self, source: Source, surroundings: Surroundings) -> None:
        """Ask until nothing is missing, the worker is gone, or its news cannot be used."""
        delay = 0.2
        try:
            while self._sources.get(source.worker) is source and source.lost and not source.refused:
                try:
                    async with self._turn:
                        answer = await surroundings.call(source.instance, ENDPOINT, encode(source.ask()), timeout=ASK_TIMEOUT)
                    await self._take_in(source, answer)
                    delay = 0.2
                except (DynamoError, TimeoutError, ValueError, RecursionError) as e:
                    source.whole = False
                    source.unanswered = f"its KV picture cannot be fetched: {e or 'no answer in time'}"
                    self._look(source)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, 5.0)
        finally:
            source.asking = False
            self._still_for = None
            self._look(source)

    async def _take_in(self, source: Source, answer: Sequence[bytes]) -> None:
        """:raises ValueError: it is no answer to what was asked."""
        news = [decode_news(item) for item in answer]
        if news and news[0].secret != self.hasher.fingerprint:
            source.take(news[0], self.clock(), self.hasher)
            return
        whole, changes = source.answered(news)
        source.heard = self.clock()
        if whole:
            self._clear(source)
        for op, level, keys in self._grain.of_changes(changes):
            for start in range(0, max(1, len(keys)), STEP):
                if self._sources.get(source.worker) is not source:
                    return
                self.index.apply(source.worker, Change(op, level, keys[start : start + STEP]))
                await asyncio.sleep(0)
        for change in self._grain.of_changes(source.resumed()):
            self.index.apply(source.worker, change)


def _state(source: Source | None) -> str:
    if source is None or not source.publishes:
        return "approximate"
    if source.degraded:
        return "degraded"
    return "events" if source.whole else "syncing"


__all__ = ["KvIndex"]
