"""The worker's side of the KV event path: what the engine reports goes out as numbered news, and can be asked for again.

Blocks are named here, at the edge, so that routers get 64-bit keys and not token ids. What the engine reports within `BATCH` seconds
travels together. The last news are kept for routers that missed some; a router that missed more, or everything, gets the whole picture.
Each rank says every `PULSE` seconds that it is there and what its last news were, so that lost news and silent workers are noticed
although nothing else happens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.engines.contract import BlocksStored, KvEvent
from dynamo_core.errors import RequestError
from dynamo_core.kv import Chains, Change, Hasher, News
from dynamo_core.kv.wire import Ask, decode_ask, encode, joined, pack

log = logging.getLogger(__name__)

BATCH = 0.01
"""Seconds that a report of the engine may wait for others."""
PULSE = 1.0
"""Seconds between signs of life."""
KEEP_BYTES = 4 * 2**20
"""News of one rank that are kept to be sent again."""
CHUNK = 1 << 15
"""Keys in one message of a whole picture."""
SILENT_PROMPTS = 5
"""Prompts of a block or more, after which an engine that has still reported no block is not trusted to report any."""


@attrs.define(eq=False)
class _Rank:
    chains: Chains
    waiting: list[Change] = attrs.field(factory=list[Change])
    id: int = 0
    kept: deque[tuple[int, bytes]] = attrs.field(factory=deque[tuple[int, bytes]])
    kept_bytes: int = 0
    silent: str = ""
    said: str = ""
    """The problem that was logged last."""


class KvRelay:
    """One worker's relay, for all its ranks. Call it from the event loop only."""

    def __init__(self, card: ModelCard, secret: bytes, publish: Callable[[bytes], None]) -> None:
        self._card = card
        self._hasher = Hasher(secret, card.block_size)
        self._publish = publish
        self._stream = secrets.randbits(62) | 1
        limit = max(1_000_000, 4 * (card.total_blocks or 0))
        self._ranks = {rank: _Rank(Chains(self._hasher, limit)) for rank in range(card.dp_start, card.dp_start + card.dp_size)}
        self._lost_ranks = False
        self._flushing: asyncio.TimerHandle | None = None
        self._pulse = asyncio.create_task(self._beat(), name="kv pulse")
        self._prompts = 0
        self._reported = False

    def reported(self, events: Sequence[KvEvent], dp_rank: int) -> None:
        """The engine stored or removed blocks."""
        if (rank := self._ranks.get(dp_rank)) is None:
            if not self._lost_ranks:
                log.error("the engine reports KV blocks of rank %d, and its card has only %s; they are left out", dp_rank, sorted(self._ranks))
            self._lost_ranks = True
            return
        self._reported = self._reported or any(isinstance(event, BlocksStored) for event in events)
        rank.waiting += rank.chains.apply(events)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(BATCH, self._flush)

    def prompted(self, tokens: int) -> None:
        """The engine was given a prompt; one that never reports a block although it should is found out by this."""
        if not self._reported and tokens >= self._card.block_size:
            self._prompts += 1

    def problem(self, dp_rank: int) -> str:
        """Why the news of this rank should not be trusted; empty when all is well."""
        if not self._reported and self._prompts >= SILENT_PROMPTS:
            return f"the engine was to report its KV blocks, and reported none after {self._prompts} prompts"
        return self._ranks[dp_rank].chains.problem()

    def problems(self) -> dict[str, str]:
        return {f"kv rank {rank}": problem for rank in self._ranks if (problem := self.problem(rank))}

    # -------------------------------------------------------------- out

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        for dp_rank, rank in self._ranks.items():
            if rank.waiting:
                changes, rank.waiting = joined(rank.waiting), []
                rank.id += 1
                message = encode(self._news(dp_rank, rank, changes))
                rank.kept.append((rank.id, message))
                rank.kept_bytes += len(message)
                while rank.kept_bytes > KEEP_BYTES and len(rank.kept) > 1:
                    rank.kept_bytes -= len(rank.kept.popleft()[1])
                self._publish(message)

    def _news(self, dp_rank: int, rank: _Rank, changes: Sequence[Change], *, whole: bool = False) -> News:
        return News(self._stream, rank.id, dp_rank, self._hasher.fingerprint, self._card.block_size, pack(changes), whole, self.problem(dp_rank))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(PULSE)
            for dp_rank, rank in self._ranks.items():
                news = self._news(dp_rank, rank, ())
                if news.problem and news.problem != rank.said:
                    log.error("rank %d: %s; routers do not count on its KV cache", dp_rank, news.problem)
                rank.said = news.problem
                self._publish(encode(news))

    # -------------------------------------------------------------- asked for

    async def answer(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """Endpoint `kv_state`: the news after those that the asker has, or the whole picture."""
        try:
            ask = decode_ask(payload)
        except msgspec.MsgspecError as e:
            raise RequestError(f"not a question about the KV cache: {e}") from e
        self._flush()
        if (rank := self._ranks.get(ask.dp_rank)) is None:
            raise RequestError(f"this worker has no data-parallel rank {ask.dp_rank}; it has {sorted(self._ranks)}")
        for message in self._again(rank, ask) or self._whole(ask.dp_rank, rank):
            yield message

    def _again(self, rank: _Rank, ask: Ask) -> list[bytes]:
        if ask.stream != self._stream or not 0 < ask.after < rank.id or not rank.kept or rank.kept[0][0] > ask.after + 1:
            return []
        return [message for id, message in rank.kept if id > ask.after]

    def _whole(self, dp_rank: int, rank: _Rank) -> list[bytes]:
        parts = [Change(op, level, keys[i : i + CHUNK]) for op, level, keys in rank.chains.picture() for i in range(0, len(keys), CHUNK)]
        return [encode(self._news(dp_rank, rank, [part], whole=True)) for part in parts] or [encode(self._news(dp_rank, rank, (), whole=True))]

    def close(self) -> None:
        self._pulse.cancel()
        if self._flushing is not None:
            self._flushing.cancel()
