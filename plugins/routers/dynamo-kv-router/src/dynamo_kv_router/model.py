"""Provider `engine-model`: the work that each worker has been sent, priced by what such work was seen to cost.

Workers with alike cards share one fit. It needs nothing of the engine but the times of first tokens and of growth:

    prefill   ms from its start to the first token   over (1, uncached tokens, uncached tokens x context before them)
    decode    ms of one step, while nothing prefills over (1, sequences, tokens of context)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import Fact, RoutingRequest, Worker
from dynamo_core.routing.providers import Rows
from dynamo_core.types import Instance
from dynamo_kv_router.fit import Prices
from dynamo_kv_router.load_facts import (
    ATTENTION_MS,
    BACKLOG,
    CONTEXT,
    DECODE_MS,
    DECODING,
    GENERATED,
    OUTPUT_TOKENS,
    PASS_MS,
    PREFILL_MS,
    RECENT,
    SAMPLES,
    SEQUENCE_MS,
    STEP_MS,
)

PREFILL_GUESS = (15.0, 0.02, 5e-7)
"""Of an 8B model on a data-centre GPU; only the proportions matter, and only for the first requests."""
DECODE_GUESS = (7.0, 0.05, 3e-5)
TOGETHER = 0.5
"""Milliseconds that are no time at all: first tokens so close to each other came out of the same pass, and nothing is learned from them alone. Nor from
tokens that are told of at once, whenever they came."""
ALIKE = 0.2
"""Share of what a prefill should cost; if it ends sooner after another one, the two shared a pass. News of one pass do not come all at once: this process
has other work, and what other frontends sent there is heard of on another way."""

LATE = 60.0
"""Seconds after which what was sent counts for a third: longer than a burst, shorter than a conversation."""


class Fit:
    """What is known of one kind of worker."""

    def __init__(self, memory: float = 500.0) -> None:
        self.prefill = Prices(PREFILL_GUESS, memory=memory)
        self.decode = Prices(DECODE_GUESS, memory=memory, floor=0.5)
        self.output_tokens = 256.0
        self.answers = 0

    def answered(self, tokens: int) -> None:
        self.answers += 1
        self.output_tokens += (tokens - self.output_tokens) * max(0.01, 1.0 / (self.answers + 2))


@attrs.define
class _Job:
    prompt: int
    uncached: int
    booked: float
    tokens: int = 0
    """Output so far."""
    since: float = 0.0
    """When `tokens` was last looked at."""
    clean: int = 0
    """The worker's count of prefills at that time."""

    @property
    def pairs(self) -> float:
        return self.uncached * (self.prompt - 0.5 * self.uncached)


@attrs.define
class _Account:
    fit: Fit = attrs.field(factory=Fit)
    waiting: dict[str, _Job] = attrs.field(factory=dict)
    """Sent, and not at its first token; in order."""
    decoding: dict[str, _Job] = attrs.field(factory=dict)
    uncached: int = 0
    pairs: float = 0.0
    context: int = 0
    generated: int = 0
    promised: float = 0.0
    """Milliseconds of prefill that waits in the router's queue for this worker."""
    sent: float = 0.0
    """Milliseconds of prefill that were sent, passes apart, each `exp(seconds since the model's epoch / LATE)` times: all fade by one factor."""
    free_at: float = 0.0
    """When the last pass ended, as far as is known."""
    prefills: int = 0
    """Bookings so far, which tells whether decoding was left alone."""
    done: list[_Job] = attrs.field(factory=list)
    """Prefills that ended in the last pass; a sample once the next pass has ended."""
    done_from: float = 0.0
    in_order: bool = False
    """The oldest request that waited was among `done`, so that the pass worked for nobody else before."""

    def backlog(self, now: float) -> float:
        """Milliseconds of prefill still to do."""
        if not self.waiting:
            return self.promised
        fixed, token, pair = self.fit.prefill.values
        whole = fixed * len(self.waiting) + token * self.uncached + pair * self.pairs
        head = next(iter(self.waiting.values()))
        first = fixed + token * head.uncached + pair * head.pairs
        return self.promised + max(0.0, whole - min(0.9 * first, 1e3 * (now - max(head.booked, self.free_at))))


@attrs.define
class EngineModel:
    """Backlog in milliseconds, and the prices behind it."""

    remember: float = attrs.field(default=500.0, validator=v.ge(10))
    """Samples after which an old one counts for a third."""
    provides = (BACKLOG, RECENT, DECODING, CONTEXT, GENERATED, PASS_MS, PREFILL_MS, ATTENTION_MS, STEP_MS, SEQUENCE_MS, DECODE_MS, OUTPUT_TOKENS, SAMPLES)
    clock: Callable[[], float] = attrs.field(default=time.monotonic, init=False, eq=False, repr=False)
    _epoch: float = attrs.field(default=0.0, init=False, eq=False, repr=False)
    _rows: Rows[_Account] = attrs.field(factory=lambda: Rows(_Account), init=False, eq=False, repr=False)
    _promised: list[_Account] = attrs.field(factory=list, init=False, eq=False, repr=False)
    _fits: dict[tuple[Any, ...], Fit] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        kind = (card.engine, card.role, card.total_blocks, card.max_batched_tokens, tuple(t for t in card.taints if t.startswith("gpu")))
        if (fit := self._fits.get(kind)) is None:
            fit = self._fits[kind] = Fit(self.remember)
        self._rows.join(worker).fit = fit

    def left(self, worker: Worker) -> None:
        self._rows.leave(worker)

    # -------------------------------------------------------------- what happens

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        account = self._rows.get(worker)
        if account is None or request.id in account.waiting or request.id in account.decoding:
            return
        prompt = request.prompt_tokens or len(request.token_ids)
        now = self.clock()
        job = _Job(prompt, max(1, prompt - overlap_tokens), now)
        faded = self._faded(now)  # first: it may change what `sent` means
        account.sent += account.fit.prefill.estimate((0.0, job.uncached, job.pairs)) / faded
        account.waiting[request.id] = job
        account.uncached += job.uncached
        account.pairs += job.pairs
        account.context += prompt
        account.prefills += 1

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None:
        account = self._rows.get(worker)
        if account is None or request_id not in account.waiting:
            return
        now = self.clock()
        first = next(iter(account.waiting)) == request_id
        job = _take(account, request_id)
        if cached_tokens is not None:
            job.uncached = max(1, job.prompt - cached_tokens)
        self._prefilled(account, job, now, in_order=first)
        job.tokens, job.since, job.clean = 1, now, account.prefills
        account.decoding[request_id] = job
        account.context += 1
        account.generated += 1

    def _prefilled(self, account: _Account, job: _Job, now: float, *, in_order: bool) -> None:
        """A pass that ends several prefills is one sample, so that it waits until the pass is known to be over."""
        alone = account.fit.prefill.estimate((1.0, job.uncached, job.pairs))
        if job.booked < account.free_at and 1e3 * (now - account.free_at) <= max(TOGETHER, ALIKE * alone):
            account.done.append(job)
            account.in_order = account.in_order or in_order
        else:
            self._learn_prefill(account)
            account.done_from, account.done, account.in_order = max(job.booked, account.free_at), [job], in_order
        account.free_at = now

    def _learn_prefill(self, account: _Account) -> None:
        jobs, spent = account.done, 1e3 * (account.free_at - account.done_from)
        if account.in_order and spent > TOGETHER:
            # Prefills that share a pass share its fixed cost as well.
            account.fit.prefill.learn((1.0, float(sum(j.uncached for j in jobs)), sum(j.pairs for j in jobs)), spent)

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        account = self._rows.get(worker)
        if account is None or (job := account.decoding.get(request_id)) is None:
            return
        now, steps = self.clock(), output_tokens - job.tokens
        if steps > 0 and not account.waiting and job.clean == account.prefills and 1e3 * (now - job.since) > TOGETHER:
            account.fit.decode.learn((1.0, float(len(account.decoding)), float(account.context)), 1e3 * (now - job.since) / steps)
        account.context += steps
        account.generated += steps
        # A stretch is clean when nothing is prefilling at its start, and nothing starts before its end.
        job.tokens, job.since, job.clean = output_tokens, now, -1 if account.waiting else account.prefills

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None:
        if (account := self._rows.get(worker)) is None:
            return
        if request_id in account.waiting:
            account.context -= _take(account, request_id).prompt
        elif (job := account.decoding.pop(request_id, None)) is not None:
            account.context -= job.prompt + job.tokens
            account.generated -= job.tokens
            if outcome == "done":
                account.fit.answered(job.tokens)

    def parked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        if (account := self._rows.get(worker)) is not None:
            uncached = max(1, request.prompt_tokens - overlap_tokens)
            account.promised += account.fit.prefill.estimate((1.0, uncached, uncached * (request.prompt_tokens - 0.5 * uncached)))
            self._promised.append(account)

    def unparked(self) -> None:
        for account in self._promised:
            account.promised = 0.0
        self._promised.clear()

    def _faded(self, now: float) -> float:
        """What is left of something that was sent at the epoch. The epoch moves before numbers grow out of bounds."""
        faded = math.exp((self._epoch - now) / LATE)
        if now - self._epoch < 10 * LATE:
            return faded
        for account in self._rows.all():
            account.sent *= faded
        self._epoch = now
        return 1.0

    # -------------------------------------------------------------- what is told

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Mapping[Fact[Any], Sequence[Any]]:
        accounts, now = self._rows(workers), self.clock()
        faded = self._faded(now)
        prefill = [a.fit.prefill.values for a in accounts]
        decode = [a.fit.decode.values for a in accounts]
        return {
            BACKLOG: tuple([a.backlog(now) if a.waiting else a.promised for a in accounts]),
            RECENT: tuple([a.sent * faded for a in accounts]),
            DECODING: tuple([len(a.decoding) for a in accounts]),
            CONTEXT: tuple([a.context for a in accounts]),
            GENERATED: tuple([a.generated for a in accounts]),
            STEP_MS: tuple([d[0] for d in decode]),
            PASS_MS: tuple([p[0] for p in prefill]),
            PREFILL_MS: tuple([p[1] for p in prefill]),
            ATTENTION_MS: tuple([p[2] for p in prefill]),
            SEQUENCE_MS: tuple([d[1] for d in decode]),
            DECODE_MS: tuple([d[2] for d in decode]),
            OUTPUT_TOKENS: tuple([a.fit.output_tokens for a in accounts]),
            SAMPLES: tuple([a.fit.prefill.samples for a in accounts]),
        }


def _take(account: _Account, request_id: str) -> _Job:
    job = account.waiting.pop(request_id)
    account.uncached -= job.uncached
    account.pairs = account.pairs - job.pairs if account.waiting else 0.0
    return job
