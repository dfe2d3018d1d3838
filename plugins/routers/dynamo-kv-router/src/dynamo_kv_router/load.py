"""Provider `kv-load`: prompt blocks in use on each worker, those that requests share counted once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.kv.hashing import Hasher
from dynamo_core.routing.contract import Fact, RoutingRequest, Surroundings, Worker
from dynamo_core.types import Instance
from dynamo_kv_router.active import ActiveChains
from dynamo_kv_router.keys import LOCAL_SECRET, hasher_for, numbers_of
from dynamo_kv_router.load_facts import ACTIVE_BLOCKS, ACTIVE_OVERLAP_TOKENS, POTENTIAL_BLOCKS


@attrs.define
class KvLoad:
    """What requests in progress hold of each KV cache, prompt blocks only."""

    assume_reuse: bool = True
    """Off: requests share nothing, whatever their prompts (for engines without a prefix cache)."""
    provides = (ACTIVE_BLOCKS, POTENTIAL_BLOCKS, ACTIVE_OVERLAP_TOKENS)
    _chains: ActiveChains = attrs.field(factory=ActiveChains, init=False, eq=False, repr=False)
    _open: dict[tuple[str, Worker], Sequence[int]] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    _alone: dict[Worker, int] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """Blocks that cannot be shared, because nobody knows their keys."""
    _hasher: Hasher | None = attrs.field(default=None, init=False, eq=False, repr=False)
    _block_size: int = attrs.field(default=16, init=False, eq=False, repr=False)
    _secret: bytes = attrs.field(default=LOCAL_SECRET, init=False, eq=False, repr=False)

    def joined(self, worker: Worker, instance: Instance, card: ModelCard) -> None:
        self._block_size = max(1, card.block_size)
        self._hasher = hasher_for(self._secret, self._block_size)
        self._chains.join(worker)
        self._alone.setdefault(worker, 0)

    def left(self, worker: Worker) -> None:
        self._chains.leave(worker)
        self._alone.pop(worker, None)
        self._open = {key: chain for key, chain in self._open.items() if key[1] != worker}

    async def attach(self, surroundings: Surroundings) -> None:
        # The fleet's names for blocks: the index computes the same, and other frontends say which blocks they mean.
        self._secret = await surroundings.secret("kv")
        self._hasher = hasher_for(self._secret, self._block_size)

    async def detach(self) -> None: ...

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        if (request.id, worker) in self._open or worker not in self._alone:
            return
        keys = self._keys(request)
        if not keys:
            # Nobody knows which blocks they are: they count, and nothing is shared with them.
            keys = range(request.prompt_tokens // self._block_size)
            self._alone[worker] += len(keys)
        else:
            self._chains.add(worker, keys)
        self._open[request.id, worker] = keys

    def first_token(self, request_id: str, worker: Worker, cached_tokens: int | None) -> None: ...

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None: ...

    def finished(self, request_id: str, worker: Worker, outcome: Literal["done", "failed", "cancelled"]) -> None:
        if (keys := self._open.pop((request_id, worker), None)) is None:
            return
        if isinstance(keys, range):
            self._alone[worker] -= len(keys)
        else:
            self._chains.remove(worker, keys)

    def columns(self, request: RoutingRequest, workers: Sequence[Worker]) -> Mapping[Fact[Any], Sequence[Any]]:
        chains, alone, size = self._chains, self._alone, self._block_size
        active = [chains.blocks(worker) + alone.get(worker, 0) for worker in workers]
        keys = self._keys(request)
        depths = chains.depths(keys, workers)
        added = len(keys) or request.prompt_tokens // size
        return {
            ACTIVE_BLOCKS: tuple(active),
            POTENTIAL_BLOCKS: tuple([a + added - d for a, d in zip(active, depths, strict=True)]),
            ACTIVE_OVERLAP_TOKENS: tuple([d * size for d in depths]),
        }

    def _keys(self, request: RoutingRequest) -> list[int]:
        return numbers_of(self._hasher, request) if self.assume_reuse and self._hasher is not None else []
