"""The built-in sources of facts: who is there, what this process sent, what the engines report.

Each holds one small object per worker. The list of them in row order is kept for as long as the fleet does not change, so
that a column costs one attribute read per worker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.routing.contract import Fact, RoutingRequest, Worker
from dynamo_core.routing.facts import (
    BLOCK_SIZE,
    BOOKED_BLOCKS,
    BOOKED_PREFILL_TOKENS,
    DRAINING,
    ENGINE_KV_USAGE,
    ENGINE_REPORT_AGE,
    ENGINE_RUNNING,
    ENGINE_WAITING,
    IN_FLIGHT,
    INHIBITED,
    INHIBITED_WHY,
    MAX_BATCHED_TOKENS,
    MAX_SEQUENCES,
    PROVEN,
    TAINTS,
    TOTAL_BLOCKS,
    TURN,
)
from dynamo_core.types import Instance, Load

Columns = Mapping[Fact[Any], Sequence[Any]]
S = TypeVar("S")


class Rows(Generic[S]):
    """One state object per worker, and their list in the row order last asked for."""

    def __init__(self, new: Callable[[], S]) -> None:
        self._new = new
        self._of: dict[Worker, S] = {}
        self._workers: Sequence[Worker] | None = None
        self._rows: list[S] = []

    def join(self, worker: Worker) -> S:
        """The state of a worker that joins, or that joins again with another card."""
        if (state := self._of.get(worker)) is None:
            self._workers = None
            state = self._of[worker] = self._new()
        return state

    def leave(self, worker: Worker) -> None:
        self._workers = None
        self._of.pop(worker, None)

    def get(self, worker: Worker) -> S | None:
        return self._of.get(worker)

    def all(self) -> Iterable[S]:
        return self._of.values()

    def __call__(self, workers: Sequence[Worker]) -> list[S]:
        """A worker that never joined gets a state of its own that says nothing."""
        if workers is not self._workers:
            self._rows = [state if (state := self._of.get(worker)) is not None else self._new() for worker in workers]
            self._workers = workers
        return self._rows


# ------------------------------------------------------------------ fleet


@attrs.define
class _Member:
    taints: tuple[str, ...] = ()
    max_sequences: int = 0
    max_batched_tokens: int = 0
    total_blocks: int = 0
    block_size: int = 16
    proven: bool = False
    draining: bool = False
    inhibited_until: float = 0.0
    why: str = ""
    turn: int = -1


@attrs.define
class FleetFacts:
    """Who is there: what the model card says, health, and whose turn was when."""

    provides = (INHIBITED, INHIBITED_WHY, DRAINING, PROVEN, TAINTS, MAX_SEQUENCES, MAX_BATCHED_TOKENS, TOTAL_BLOCKS, BLOCK_SIZE, TURN)
    clock: Callable[[], float] = attrs.field(default=time.monotonic, init=False, eq=False, repr=False)
    _rows: Rows[_Member] = attrs.field(factory=lambda: Rows(_Member), init=False, eq=False, repr=False)
    _still: dict[Fact[Any], tuple[Any, ...]] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """Columns that stay as they are until something joins, leaves or falls ill; records share them."""
    _still_for: Sequence[Worker] | None = attrs.field(default=None, init=False, eq=False, repr=False)
    _inhibited: bool = attrs.field(default=False, init=False, eq=False, repr=False)
    _decisions: int = attrs.field(default=0, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        member = self._rows.join(worker)
        member.taints, member.block_size = card.taints, card.block_size
        member.max_sequences, member.total_blocks = card.max_sequences or 0, card.total_blocks or 0
        member.max_batched_tokens = card.max_batched_tokens or 0
        self._still_for = None

    def left(self, worker: Worker) -> None:
        self._rows.leave(worker)
        self._still_for = None

    def health(self, worker: Worker, *, proven: bool, draining: bool, inhibited_until: float, why: str) -> None:
        if (member := self._rows.get(worker)) is not None:
            member.proven, member.draining, member.inhibited_until, member.why = proven, draining, inhibited_until, why
            self._still_for = None

    def chosen(self, request: RoutingRequest, worker: Worker) -> None:
        if (member := self._rows.get(worker)) is not None:
            member.turn = self._decisions
            self._decisions += 1

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Columns:
        members = self._rows(workers)
        if workers is not self._still_for:
            self._refresh(members, workers)
        columns: dict[Fact[Any], tuple[Any, ...]] = {**self._still, TURN: tuple([m.turn for m in members])}
        if self._inhibited:
            now = self.clock()
            columns[INHIBITED] = tuple([max(0.0, m.inhibited_until - now) for m in members])
            if not any(columns[INHIBITED]):
                self._still_for = None
        return columns

    def _refresh(self, members: list[_Member], workers: Sequence[Worker]) -> None:
        now = self.clock()
        self._inhibited = any(m.inhibited_until > now for m in members)
        self._still = {
            INHIBITED: (0.0,) * len(members),
            INHIBITED_WHY: tuple([m.why if m.inhibited_until > now else "" for m in members]),
            DRAINING: tuple([m.draining for m in members]),
            PROVEN: tuple([m.proven for m in members]),
            TAINTS: tuple([m.taints for m in members]),
            MAX_SEQUENCES: tuple([m.max_sequences for m in members]),
            MAX_BATCHED_TOKENS: tuple([m.max_batched_tokens for m in members]),
            TOTAL_BLOCKS: tuple([m.total_blocks for m in members]),
            BLOCK_SIZE: tuple([m.block_size for m in members]),
        }
        self._still_for = workers


# ------------------------------------------------------------------ bookings


@attrs.define
class _Account:
    block_size: int = 16
    requests: int = 0
    prefill_tokens: int = 0
    blocks: int = 0


@attrs.define
class _Booking:
    prompt_tokens: int
    prefill_tokens: int
    blocks: int


@attrs.define
class Bookings:
    """What this process has sent to each worker and not yet seen end."""

    provides = (IN_FLIGHT, BOOKED_PREFILL_TOKENS, BOOKED_BLOCKS)
    _rows: Rows[_Account] = attrs.field(factory=lambda: Rows(_Account), init=False, eq=False, repr=False)
    _open: dict[tuple[str, Worker], _Booking] = attrs.field(factory=dict, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        self._rows.join(worker).block_size = max(1, card.block_size)

    def left(self, worker: Worker) -> None:
        self._rows.leave(worker)
        self._open = {key: booking for key, booking in self._open.items() if key[1] != worker}

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        account, key = self._rows.get(worker), (request.id, worker)
        if account is None or key in self._open:
            return
        tokens = request.prompt_tokens or len(request.token_ids)
        prefill = max(0, tokens - overlap_tokens) if request.prefills else 0
        booking = self._open[key] = _Booking(tokens, prefill, -(-tokens // account.block_size))
        account.requests += 1
        account.prefill_tokens += booking.prefill_tokens
        account.blocks += booking.blocks

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None:
        account, booking = self._rows.get(worker), self._open.get((request_id, worker))
        if account is not None and booking is not None:
            account.prefill_tokens -= booking.prefill_tokens
            booking.prefill_tokens = 0

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        account, booking = self._rows.get(worker), self._open.get((request_id, worker))
        if account is not None and booking is not None:
            blocks = -(-(booking.prompt_tokens + output_tokens) // account.block_size)
            account.blocks += blocks - booking.blocks
            booking.blocks = blocks

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None:
        account, booking = self._rows.get(worker), self._open.pop((request_id, worker), None)
        if account is not None and booking is not None:
            account.requests -= 1
            account.prefill_tokens -= booking.prefill_tokens
            account.blocks -= booking.blocks

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Columns:
        accounts = self._rows(workers)
        return {
            IN_FLIGHT: tuple([a.requests for a in accounts]),
            BOOKED_PREFILL_TOKENS: tuple([a.prefill_tokens for a in accounts]),
            BOOKED_BLOCKS: tuple([a.blocks for a in accounts]),
        }


# ------------------------------------------------------------------ engine-load


@attrs.define
class _Report:
    running: int = 0
    waiting: int = 0
    usage: float = 0.0
    at: float = -math.inf


def _load_decoder() -> msgspec.msgpack.Decoder[Load]:
    return msgspec.msgpack.Decoder(Load)


@attrs.define
class EngineLoad:
    """What the engines report of themselves on the event plane."""

    provides = (ENGINE_RUNNING, ENGINE_WAITING, ENGINE_KV_USAGE, ENGINE_REPORT_AGE)
    topics = ("load",)
    clock: Callable[[], float] = attrs.field(default=time.monotonic, init=False, eq=False, repr=False)
    _rows: Rows[_Report] = attrs.field(factory=lambda: Rows(_Report), init=False, eq=False, repr=False)
    _decoder: msgspec.msgpack.Decoder[Load] = attrs.field(factory=_load_decoder, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        self._rows.join(worker)

    def left(self, worker: Worker) -> None:
        self._rows.leave(worker)

    def on_event(self, topic: str, publisher: int, payload: bytes) -> None:
        load = self._decoder.decode(payload)
        if (report := self._rows.get(Worker(publisher, load.dp_rank))) is not None:
            report.running, report.waiting, report.at = load.running, load.waiting, self.clock()
            report.usage = min(1.0, max(0.0, load.kv_used_blocks / load.kv_total_blocks)) if load.kv_total_blocks else 0.0

    def on_gap(self, topic: str, publisher: int, missed: int) -> None:
        """Every report is a whole picture, so the next one makes good what was lost."""

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Columns:
        reports, now = self._rows(workers), self.clock()
        return {
            ENGINE_RUNNING: tuple([r.running for r in reports]),
            ENGINE_WAITING: tuple([r.waiting for r in reports]),
            ENGINE_KV_USAGE: tuple([r.usage for r in reports]),
            ENGINE_REPORT_AGE: tuple([now - r.at for r in reports]),
        }
