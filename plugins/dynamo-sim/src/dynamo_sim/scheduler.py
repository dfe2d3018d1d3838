"""The scheduler of a continuous-batching engine, as a pure step machine: no clock, no I/O, no randomness.

Each `step` spends one token budget: first on what is running, in order of admission, one token for each sequence that
decodes and a chunk for each that is still reading its prompt; then on what waits. When no block is left, a running
sequence is preempted: it gives back its blocks and is computed again later. The caller lets `Step.duration_ms` pass, on
a real clock or a virtual one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence as Seq
from typing import Any, Literal

import attrs

from dynamo_core.engines import KvEvent
from dynamo_core.types import FinishReason, Load
from dynamo_sim.blocks import BlockPool, chain, root_hash
from dynamo_sim.timing import Timing
from dynamo_sim.tokens import INCREMENT, MASK, MULTIPLIER, absorb


@attrs.frozen
class Limits:
    total_blocks: int = 16384
    block_size: int = 64
    max_sequences: int = 256
    max_batched_tokens: int = 8192
    chunked_prefill: bool = True
    prefix_caching: bool = True
    preemption: str = "lifo"
    """Who gives way when blocks run out: the newest running sequence (`lifo`) or the oldest (`fifo`)."""


@attrs.define(eq=False)
class Sequence:
    """One choice of one request. The first block of fields is the caller's; the rest is the scheduler's."""

    prompt: list[int]
    """All tokens known at the start, those included that another worker generated."""
    left: int
    """Tokens still to generate, a closing end-of-sequence token included; at least 1."""
    state: int
    """Of the token generator before the prompt: `tokens.seed_state`."""
    eos: int | None = None
    """The token that ends it naturally, as the last of `left`; `None`: it ends by length."""
    stop_ids: frozenset[int] = frozenset()
    stop_after: int = 0
    """Tokens to generate before stop ids count."""
    fetched: int = 0
    """Prompt tokens whose blocks came from another worker; preempted, it computes them like anybody."""
    keep: bool = False
    """Its blocks stay in use after its end, until it is cancelled: another worker is to fetch them."""
    adapter: str | None = None
    cache_salt: str | None = None
    media: tuple[str, ...] = ()
    """Digests of the images that the prompt depends on, from its first token."""
    index: int = 0
    """Which choice of its request."""
    owner: Any = None
    """Whatever the caller wants to find again in `Step.sequences`."""

    generated: list[int] = attrs.field(factory=list, init=False)
    finish_reason: FinishReason | None = attrs.field(default=None, init=False)
    stop_reason: int | None = attrs.field(default=None, init=False)
    cached_tokens: int = attrs.field(default=0, init=False)
    """Prompt tokens that were in the cache when it was first admitted."""
    preemptions: int = attrs.field(default=0, init=False)

    hashes: list[int] = attrs.field(factory=list, init=False)
    """Of every full block of known tokens; the first `held` of them are in use."""
    held: int = attrs.field(default=0, init=False)
    private: int = attrs.field(default=0, init=False)
    computed: int = attrs.field(default=0, init=False)
    room: int = attrs.field(default=0, init=False)
    """Tokens that can be computed before another block is needed."""
    place: Literal["waiting", "prefill", "decode", "kept", "gone"] = attrs.field(default="waiting", init=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens `start` to `end` of prompt and output together."""
        border = len(self.prompt)
        if end <= border:
            return self.prompt[start:end]
        return self.prompt[start:] + self.generated[max(0, start - border) : end - border]


@attrs.frozen(eq=False)
class Step:
    """What one step did: `tokens[i]` is the new token of `sequences[i]`, whose `finish_reason` says whether it was the last."""

    duration_ms: float
    sequences: Seq[Sequence]
    tokens: Seq[int]
    events: Seq[KvEvent]
    prefill_tokens: int
    preempted: int


class Scheduler:
    def __init__(self, limits: Limits, timing: Timing, words: Seq[int]) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.total_blocks)
        self._timing = timing
        self._words = words
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def load(self) -> Load:
        return Load(len(self._running), len(self._waiting), self.pool.used, self.limits.total_blocks, sum(map(len, self._waiting)))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. :raises ValueError: it could never run."""
        limits = self.limits
        most = len(sequence.prompt) + sequence.left
        if most > limits.total_blocks * limits.block_size:
            raise ValueError(f"{most} tokens do not fit in {limits.total_blocks} blocks of {limits.block_size}")
        if not limits.chunked_prefill and most > limits.max_batched_tokens:
            raise ValueError(f"{most} tokens are more than one step may compute ({limits.max_batched_tokens}), and chunked prefill is off")
        packed = array("I", sequence.prompt)
        sequence.state = absorb(sequence.state, packed)
        if limits.prefix_caching:
            sequence.hashes = chain(root_hash(sequence.adapter, sequence.cache_salt, sequence.media), packed, limits.block_size)
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Stop and free at once. Silent for what has ended."""
        if sequence.place == "waiting":
            self._waiting.remove(sequence)
        elif sequence.place != "gone":
            if sequence.place != "kept":
                self._running.remove(sequence)
            self._free(sequence)
        sequence.place = "gone"

    def step(self) -> Step:
        """Compute one batch. With nothing to do it is empty and takes no time."""
        decodes: list[Sequence] = []
        chunks: list[tuple[Sequence, int]] = []
        budget, preempted = self._schedule_running(decodes, chunks)
        if preempted:
            decodes = [sequence for sequence in decodes if sequence.place == "decode"]
            chunks = [chunk for chunk in chunks if chunk[0].place == "prefill"]
        elif self._waiting:
            self._admit(budget, chunks)
        context = 0
        for sequence in decodes:
            sequence.computed += 1
            context += sequence.computed
            if not sequence.room:
                self._share_full_blocks(sequence)
        prefill_tokens = sum(count for _, count in chunks)
        duration = 0.0
        if decodes or chunks:
            attention = sum(count * (sequence.computed + count / 2) for sequence, count in chunks)
            duration = self._timing.step_ms(prefill_tokens, len(decodes), context / self.limits.block_size, attention)
        for sequence, count in chunks:
            sequence.computed += count
            self._share_full_blocks(sequence)
            if sequence.computed == len(sequence):
                sequence.place = "decode"
                decodes.append(sequence)
        tokens = self._generate(decodes)
        return Step(duration, decodes, tokens, self.pool.drain_events(), prefill_tokens, preempted)

    # ------------------------------------------------------------------ who takes part

    def _schedule_running(self, decodes: list[Sequence], chunks: list[tuple[Sequence, int]]) -> tuple[int, int]:
        """Give the running sequences their share. Returns the budget that is left, and how many were preempted."""
        budget = self.limits.max_batched_tokens
        preempted = 0
        for sequence in tuple(self._running):
            if not budget:
                break
            place = sequence.place
            if place == "waiting":
                continue  # preempted a moment ago, for one before it
            count = 1 if place == "decode" else min(len(sequence) - sequence.computed, budget)
            if sequence.room < count:
                preempted += self._make_room(sequence, count)
                if sequence.place == "waiting":
                    continue
            sequence.room -= count
            budget -= count
            if place == "decode":
                decodes.append(sequence)
            else:
                chunks.append((sequence, count))
        return budget, preempted

    def _admit(self, budget: int, chunks: list[tuple[Sequence, int]]) -> None:
        """Start waiting sequences while sequences, budget and blocks last; the first that does not fit stops the others."""
        size = self.limits.block_size
        while self._waiting and budget and len(self._running) < self.limits.max_sequences:
            sequence = self._waiting[0]
            held = self.pool.hold(sequence.hashes, (len(sequence) - 1) // size)  # the last token is always computed: its output is needed
            fetched = 0 if sequence.preemptions else max(0, sequence.fetched - held * size)
            missing = len(sequence) - held * size - fetched
            count = min(missing, budget)
            blocks = -(-(fetched + count) // size)
            if (count < missing and not self.limits.chunked_prefill) or not self.pool.take(blocks):
                self.pool.release(sequence.hashes[:held], 0)
                return
            self._waiting.popleft()
            if not sequence.preemptions:
                sequence.cached_tokens = held * size
            sequence.held, sequence.private, sequence.computed = held, blocks, held * size + fetched
            sequence.room = blocks * size - fetched - count
            sequence.place = "prefill"
            self._running.append(sequence)
            chunks.append((sequence, count))
            budget -= count

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """Claim blocks for `count` more tokens, at the cost of others or of the sequence itself. Returns how many were preempted."""
        size = self.limits.block_size
        blocks = -(-(count - sequence.room) // size)
        preempted = 0
        while not self.pool.take(blocks):
            victim = self._running[-1 if self.limits.preemption == "lifo" else 0]
            self._preempt(victim)
            preempted += 1
            if victim is sequence:
                return preempted
        sequence.private += blocks
        sequence.room += blocks * size
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._free(sequence)
        sequence.preemptions += 1
        sequence.place = "waiting"
        self._waiting.appendleft(sequence)

    # ------------------------------------------------------------------ what they compute

    def _share_full_blocks(self, sequence: Sequence) -> None:
        """Hand the blocks that were filled by the last computed tokens to the prefix cache."""
        size = self.limits.block_size
        full = sequence.computed // size
        held = sequence.held
        if full == held or not self.limits.prefix_caching:
            return
        hashes = sequence.hashes
        if len(hashes) < full:
            parent = hashes[-1] if hashes else root_hash(sequence.adapter, sequence.cache_salt, sequence.media)
            hashes += chain(parent, array("I", sequence.slice(len(hashes) * size, full * size)), size)
        parent = hashes[held - 1] if held else None
        self.pool.commit(hashes[held:full], parent, sequence.slice(held * size, full * size), sequence.adapter, sequence.cache_salt, sequence.media)
        sequence.private -= full - held
        sequence.held = full

    def _generate(self, sequences: list[Sequence]) -> list[int]:
        """One token for each. This loop runs once per token of the whole fleet: it has only what every token needs."""
        words, count = self._words, len(self._words)
        tokens: list[int] = []
        for sequence in sequences:
            state = sequence.state
            token = words[(state >> 48) % count]
            if sequence.left == 1 and sequence.eos is not None:
                token = sequence.eos
            sequence.state = ((state + token) * MULTIPLIER + INCREMENT) & MASK
            sequence.generated.append(token)
            sequence.left -= 1
            tokens.append(token)
            if not sequence.left or sequence.stop_ids:
                self._maybe_finish(sequence, token)
        return tokens

    def _maybe_finish(self, sequence: Sequence, token: int) -> None:
        if sequence.stop_ids and token in sequence.stop_ids and len(sequence.generated) > sequence.stop_after:
            sequence.finish_reason, sequence.stop_reason = "stop", token
        elif not sequence.left:
            sequence.finish_reason = "length" if sequence.eos is None else "stop"
        else:
            return
        self._running.remove(sequence)
        if sequence.keep:
            sequence.place = "kept"
            return
        self._free(sequence)
        sequence.place = "gone"

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.hashes[: sequence.held], sequence.private)
        sequence.held = sequence.private = sequence.computed = sequence.room = 0
