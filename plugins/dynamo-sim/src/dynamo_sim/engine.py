"""The simulated engine: lets the scheduler's steps take their time, and hands the tokens to the streams."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import attrs
from attrs import validators as v

from dynamo_core.cards import Artifact, Handover, ModelCard, Role
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext, admit
from dynamo_core.errors import DynamoError, EngineDead
from dynamo_core.types import Load, Output, Request, Sampling
from dynamo_sim import vocabulary
from dynamo_sim.rendezvous import Desk, blocks_of
from dynamo_sim.scheduler import Limits, Scheduler, Sequence, Step
from dynamo_sim.timing import Fixed, Linear, Polynomial, Timing
from dynamo_sim.tokens import absorb, seed_state

_log = logging.getLogger(__name__)

_REPORT_INTERVAL = 0.1
"""Seconds between two reports of the load while it is busy."""
_ANSWER_WITHOUT_LIMIT = 128
"""`max_tokens` of a request that names none, when answers have no natural end."""


@attrs.define(eq=False)
class _Stream:
    """What one request has yet to read. A list and one future: a late reader gets several steps at once."""

    pending: list[Output] = attrs.field(factory=list)
    waiter: asyncio.Future[None] | None = None
    started: bool = False
    error: DynamoError | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: DynamoError) -> None:
        self.error = error
        self.wake()


def _fits(engine: SimEngine, _: object, value: int) -> None:
    if value > engine.total_blocks * engine.block_size:
        raise ValueError(f"'context_length' ({value}) must fit in the cache: total_blocks * block_size = {engine.total_blocks * engine.block_size}")
    if not engine.chunked_prefill and value > engine.max_batched_tokens:
        raise ValueError(f"'context_length' ({value}) must not exceed 'max_batched_tokens' ({engine.max_batched_tokens}) without chunked prefill")


def _only_timing(engine: SimEngine, _: object, value: float | None) -> None:
    if value is not None and engine.linear is not None:
        raise ValueError("'pace_ms' and 'linear' exclude each other: both say how long a step takes")


@attrs.define(eq=False)
class SimEngine:
    """Behaves like an engine on a GPU: continuous batching, chunked prefill, a paged prefix cache, and time.

    The options are described in the README of this plugin.
    """

    model: str = "sim"
    model_path: Path | None = None
    seed: int = 0
    output_tokens: int | None = attrs.field(default=None, validator=v.optional(v.ge(1)))

    total_blocks: int = attrs.field(default=16384, validator=v.ge(1))
    block_size: int = attrs.field(default=64, validator=v.ge(1))
    max_sequences: int = attrs.field(default=256, validator=v.ge(1))
    max_batched_tokens: int = attrs.field(default=8192, validator=v.ge(1))
    chunked_prefill: bool = True
    prefix_caching: bool = True
    preemption: str = attrs.field(default="lifo", validator=v.in_(["lifo", "fifo"]))
    context_length: int = attrs.field(default=32768, validator=[v.ge(2), _fits])

    speedup: float = attrs.field(default=1.0, validator=v.ge(0))
    pace_ms: float | None = attrs.field(default=None, validator=[v.optional(v.gt(0)), _only_timing])
    linear: Linear | None = None
    role: str = attrs.field(default="aggregated", validator=v.in_(["aggregated", "prefill", "decode", "encode"]))
    sees: bool = False
    encode_ms: float = attrs.field(default=20.0, validator=v.ge(0))
    protocol: Literal["prefill-first", "bootstrap"] = "prefill-first"
    bootstrap_host: str = "127.0.0.1"
    transfer_ms: float = attrs.field(default=2.0, validator=v.ge(0))
    transfer_us_per_token: float = attrs.field(default=5.0, validator=v.ge(0))
    startup_time: float = attrs.field(default=0.0, validator=v.ge(0))
    kv_events: bool = True

    _context: EngineContext = attrs.field(factory=EngineContext, init=False, repr=False)
    _card: ModelCard | None = attrs.field(default=None, init=False, repr=False)
    _vocabulary: vocabulary.Vocabulary = attrs.field(default=None, init=False, repr=False)
    _scheduler: Scheduler = attrs.field(default=None, init=False, repr=False)
    _desk: Desk | None = attrs.field(default=None, init=False, repr=False)
    """Where decode workers come for the blocks of a prefill worker."""
    _driver: asyncio.Task[None] | None = attrs.field(default=None, init=False, repr=False)
    _work: asyncio.Future[None] | None = attrs.field(default=None, init=False, repr=False)
    """What the driver waits for while there is nothing to do."""
    _streams: set[_Stream] = attrs.field(factory=set, init=False, repr=False)
    _reported: tuple[float, bool] = attrs.field(default=(0.0, True), init=False, repr=False)
    """When the load was last reported, and whether it was idle then."""

    # ------------------------------------------------------------------ the contract

    async def start(self, context: EngineContext) -> ModelCard:
        self._context = context
        await self._start_up()
        self._vocabulary = words = await asyncio.to_thread(vocabulary.of_model, self.model_path) if self.model_path else vocabulary.built_in()
        limits = Limits(**{field.name: getattr(self, field.name) for field in attrs.fields(Limits)})
        self._scheduler = Scheduler(limits, self._timing(), words.answers)
        handover = await self._open_desk()
        self._card = card = ModelCard(
            name=self.model,
            role=cast("Role", self.role),
            needs=(("prefill",),) if self.role == "decode" else (("decode",),) if self.role == "prefill" else (),
            context_length=self.context_length,
            vocab_size=words.size,
            eos_token_ids=words.eos_token_ids,
            tokenizer=Artifact.of("tokenizer.json", words.tokenizer),
            chat_template=words.chat_template,
            template_tokens=words.template_tokens,
            add_bos=words.add_bos,
            defaults=Sampling(temperature=0.0),
            default_max_tokens=None if self.output_tokens else _ANSWER_WITHOUT_LIMIT,
            block_size=self.block_size,
            total_blocks=self.total_blocks,
            max_sequences=self.max_sequences,
            max_batched_tokens=self.max_batched_tokens,
            kv_events=self.kv_events and self.prefix_caching,
            capabilities=("n", "media") if self.sees or self.role == "encode" else ("n",),
            image_placeholder="" if self.sees or self.role == "encode" else None,
            handover=handover,
            engine="dynamo-sim",
        )
        self._driver = asyncio.create_task(self._run(), name=f"sim engine of {context.name}")
        context.progress("ready", 1.0)
        return card

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if self._card is None:
            raise EngineDead("the simulated engine is not running")
        limit = admit(request, self._card)
        await self._see(request)
        if self.role == "encode":
            yield Output([], finish_reason="stop", transfer={"media": [{"digest": item["digest"]} for item in request.media or ()]})
            return
        await self._fetch(request)
        stream = _Stream()
        room = None if self._desk is None or request.transfer is None else int(request.transfer["room"])
        sequences = [self._sequence(request, index, limit, stream) for index in range(request.sampling.n)]
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._streams.add(stream)
        self._start_working()
        unfinished = len(sequences)
        loop = asyncio.get_running_loop()
        try:
            while unfinished:
                if not stream.pending:
                    if stream.error is not None:
                        raise stream.error
                    stream.waiter = loop.create_future()
                    await stream.waiter
                outputs, stream.pending = stream.pending, []
                for output in outputs:
                    if output.finish_reason is not None:
                        unfinished -= 1
                        if self.role == "prefill" and room is None:
                            output.transfer = {"tokens": len(request.token_ids)}
                    yield output
            if room is not None and self._desk is not None:
                await self._desk.taken(room)
        finally:
            self._streams.discard(stream)
            if room is not None and self._desk is not None:
                self._desk.leave(room)
            if unfinished or room is not None:
                for sequence in sequences:
                    self._scheduler.cancel(sequence)

    async def stop(self) -> None:
        self._card = None
        self._fail_streams(EngineDead("the simulated engine was stopped"))
        if self._desk is not None:
            await self._desk.close()
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.cancel()
            await asyncio.gather(driver, return_exceptions=True)

    # ------------------------------------------------------------------ optional capabilities

    def artifact(self, digest: str) -> bytes:
        if self._card is None or self._card.tokenizer is None or digest != self._card.tokenizer.digest:
            raise KeyError(digest)
        return self._vocabulary.tokenizer

    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        return {"reset_cache": self._reset_cache}

    async def _reset_cache(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Forget every cached block that no request uses."""
        dropped = self._scheduler.pool.forget_idle()
        self._start_working()  # the events leave with the next step, in their order
        return {"blocks": dropped}

    # ------------------------------------------------------------------ one request

    async def _open_desk(self) -> Handover:
        if self.role in ("aggregated", "encode"):
            return Handover()
        if self.role == "decode" or self.protocol != "bootstrap":
            return Handover(protocol=self.protocol)
        self._desk = Desk()
        return Handover(protocol=self.protocol, meeting_point=await self._desk.open(self.bootstrap_host))

    async def _see(self, request: Request) -> None:
        """Let the time pass that images take which nobody has encoded yet."""
        raw = [item for item in request.media or () if "encoded" not in item]
        fetches = request.transfer is not None and self.role == "decode"
        if raw and self.speedup and not fetches:
            await asyncio.sleep(len(raw) * self.encode_ms / 1000 / self.speedup)

    async def _fetch(self, request: Request) -> None:
        """Let the time pass that the blocks of a prompt take from one worker to another. :raises PeerLost: the other one has gone."""
        if self.role != "prefill" and (transfer := request.transfer) is not None:
            seconds = (self.transfer_ms + self.transfer_us_per_token * len(request.token_ids) / 1000) / 1000 / self.speedup if self.speedup else 0.0
            if "room" in transfer:
                async with blocks_of(transfer["host"], transfer["port"], transfer["room"]):
                    await asyncio.sleep(seconds)
            else:
                await asyncio.sleep(seconds)
        if self._card is None:
            raise EngineDead("the simulated engine was stopped")

    def _sequence(self, request: Request, index: int, limit: int, stream: _Stream) -> Sequence:
        sampling, stops = request.sampling, request.stops
        chance = (sampling.seed if sampling.seed is not None else request.id, index) if sampling.temperature else ()
        digests = tuple(str(item["digest"]) for item in request.media or ())
        end = limit
        eos = None
        if self.output_tokens is not None and not stops.ignore_eos:
            natural = max(self._natural_length(request) - request.resumed, stops.min_tokens, 0) + 1
            if natural <= limit:
                end, eos = natural, self._vocabulary.eos_token_ids[0]
        return Sequence(
            prompt=request.token_ids,
            left=end,
            state=seed_state(self.seed, *chance, *digests),
            eos=eos,
            stop_ids=frozenset(stops.stop_token_ids),
            stop_after=stops.min_tokens,
            fetched=len(request.token_ids) - 1 if request.transfer is not None and self.role != "prefill" else 0,
            keep=request.transfer is not None and self._desk is not None,
            adapter=request.adapter,
            cache_salt=request.cache_salt,
            media=digests,
            index=index,
            owner=stream,
        )

    def _natural_length(self, request: Request) -> int:
        """Tokens before end of sequence: from half to one and a half times `output_tokens`, by the prompt alone."""
        assert self.output_tokens is not None
        prompt = array("I", request.token_ids[: len(request.token_ids) - request.resumed])
        return self.output_tokens // 2 + (absorb(seed_state(self.seed, "length"), prompt) >> 32) % (self.output_tokens + 1)

    # ------------------------------------------------------------------ the step loop

    async def _start_up(self) -> None:
        """Pretend to load a model."""
        elapsed = 0.0
        while elapsed < self.startup_time:
            self._context.progress("load", elapsed / self.startup_time)
            pause = min(1.0, self.startup_time - elapsed)
            await asyncio.sleep(pause)
            elapsed += pause

    def _timing(self) -> Timing:
        if self.pace_ms is not None:
            return Fixed(self.pace_ms)
        return self.linear or Polynomial(self.total_blocks)

    async def _run(self) -> None:
        try:
            await self._steps()
        except Exception as e:
            _log.exception("the simulated engine broke")
            self._card = None
            self._context.died(f"the simulated engine broke ({type(e).__name__})")
            self._fail_streams(EngineDead(f"the simulated engine broke ({type(e).__name__})"))

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        scheduler = self._scheduler
        due = loop.time()
        while True:
            self._report(loop.time())
            if scheduler.idle:
                self._work = loop.create_future()
                await self._work
                due = loop.time()
            step = scheduler.step()
            if self.speedup:
                # From due time to due time, so that a late wake-up does not slow every later step; a step that was missed altogether is not made up for.
                due = max(due + step.duration_ms / 1000 / self.speedup, loop.time())
                await asyncio.sleep(due - loop.time())
            else:
                await asyncio.sleep(0)
            self._deliver(step)

    def _deliver(self, step: Step) -> None:
        """Hand over what a step made, to all streams within one turn of the loop, so that it can travel together."""
        if step.events and self.kv_events:
            self._context.kv_events(step.events, 0)
        for sequence, token in zip(step.sequences, step.tokens, strict=True):
            stream: _Stream = sequence.owner
            pending = stream.pending
            if pending and pending[-1].index == sequence.index:
                last = pending[-1]
                last.token_ids.append(token)
                last.finish_reason, last.stop_reason = sequence.finish_reason, sequence.stop_reason
            else:
                output = Output([token], sequence.index, sequence.finish_reason, sequence.stop_reason)
                if not stream.started:
                    stream.started = True
                    output.cached_tokens = sequence.cached_tokens
                pending.append(output)
            stream.wake()

    def _report(self, now: float) -> None:
        reported, was_idle = self._reported
        idle = self._scheduler.idle
        if idle != was_idle or (not idle and now - reported >= _REPORT_INTERVAL):
            self._reported = now, idle
            load: Load = self._scheduler.load()
            self._context.load(load)

    def _start_working(self) -> None:
        if self._work is not None and not self._work.done():
            self._work.set_result(None)

    def _fail_streams(self, error: DynamoError) -> None:
        for stream in tuple(self._streams):
            stream.fail(error)
