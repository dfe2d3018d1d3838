"""Who may run now, on which slot, and what each slot's cache holds.

llama.cpp keeps one sequence a slot. We choose the slot ourselves, by the rule that llama.cpp uses (longest common prefix, else
least recently used), because only then do we know what each of them holds and can tell the router.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count

import attrs

from dynamo_core.engines import BlocksRemoved, BlocksStored, KvEvent
from dynamo_core.errors import DynamoError
from dynamo_core.types import Load

_SIMILAR = 0.1
"""A slot whose cache covers less of the prompt than this share is not worth keeping for it."""


@attrs.define(eq=False)
class Slot:
    id: int
    held: list[int] = attrs.field(factory=list)
    """Tokens in its cache; empty also when we do not know what is there."""
    salt: str | None = None
    reuse: bool = True
    """Whether the run at hand may use what the cache held before."""
    hashes: list[int] = attrs.field(factory=list)
    """Of the full blocks of `held`."""
    last_used: int = 0


class Slots:
    """Hands out slots, most urgent request first and then in order of arrival."""

    def __init__(self, size: int, block_size: int, blocks_per_slot: int, on_change: Callable[[], None], on_kv: Callable[[Sequence[KvEvent]], None]) -> None:
        self._block_size = block_size
        self._total_blocks = size * blocks_per_slot
        self._on_change = on_change
        self._on_kv = on_kv
        self._all = [Slot(i) for i in range(size)]
        self._free = list(self._all)
        self._queue: list[tuple[int, int, asyncio.Future[Slot], Sequence[int], str | None]] = []
        self._clock = count(1)
        self._holders: Counter[int] = Counter()
        """How many slots hold each block."""

    # -------------------------------------------------------------- taking turns

    async def take(self, prompt: Sequence[int], salt: str | None, priority: int) -> Slot:
        """Wait for a slot and prepare it for `prompt`. :raises DynamoError: the error given to `fail`."""
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (-priority, next(self._clock), turn, prompt, salt))
        self._serve()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                slot = turn.result()  # it was ours for an instant, and nothing ran
                self.give_back(slot, slot.held[: len(slot.hashes) * self._block_size])
            else:
                self._queue = [entry for entry in self._queue if entry[2] is not turn]
                heapq.heapify(self._queue)
                self._on_change()
            raise

    def give_back(self, slot: Slot, held: Sequence[int]) -> None:
        """The run is over; the slot's cache now holds `held`. Empty: it may still hold what another salt left there."""
        slot.held = list(held)
        slot.last_used = next(self._clock)
        self._store(slot)
        self._free.append(slot)
        self._serve()

    def borrow(self) -> Slot | None:
        """A free slot, for work that leaves its cache as it is; `None` when all are busy."""
        return self._free.pop() if self._free else None

    def return_borrowed(self, slot: Slot) -> None:
        self._free.append(slot)
        self._serve()

    def fail(self, error: DynamoError) -> None:
        """Send away everybody who waits."""
        queue, self._queue = self._queue, []
        for _, _, turn, _, _ in queue:
            if not turn.done():
                turn.set_exception(error)

    def load(self) -> Load:
        waiting = [entry for entry in self._queue if not entry[2].done()]
        used = sum(-(-len(slot.held) // self._block_size) for slot in self._all)
        return Load(running=len(self._all) - len(self._free), waiting=len(waiting), kv_used_blocks=min(used, self._total_blocks),
                    kv_total_blocks=self._total_blocks, waiting_prefill_tokens=sum(len(entry[3]) for entry in waiting))  # fmt: skip

    def _serve(self) -> None:
        while self._free and self._queue:
            _, _, turn, prompt, salt = heapq.heappop(self._queue)
            if turn.done():
                continue
            slot = self._choose(prompt, salt)
            self._free.remove(slot)
            self._prepare(slot, prompt, salt)
            turn.set_result(slot)
        self._on_change()

    def _choose(self, prompt: Sequence[int], salt: str | None) -> Slot:
        best, shared = None, _SIMILAR * len(prompt)
        for slot in self._free:
            if slot.salt == salt and (common := _common_prefix(slot.held, prompt)) > shared:
                best, shared = slot, common
        return best or min(self._free, key=lambda slot: slot.last_used)

    def _prepare(self, slot: Slot, prompt: Sequence[int], salt: str | None) -> None:
        """What the prompt does not share is overwritten from now on."""
        slot.reuse = bool(slot.held) and slot.salt == salt
        keep = _common_prefix(slot.held, prompt) if slot.reuse else 0
        self._drop(slot, keep // self._block_size)
        slot.held = list(prompt)
        slot.salt = salt

    # -------------------------------------------------------------- what the caches hold

    def _drop(self, slot: Slot, keep: int) -> None:
        gone: list[int] = []
        while len(slot.hashes) > keep:
            block = slot.hashes.pop()
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                gone.append(block)
        if gone:
            self._on_kv([BlocksRemoved(gone)])

    def _store(self, slot: Slot) -> None:
        size = self._block_size
        full = len(slot.held) // size
        self._drop(slot, full)
        first_new: int | None = None
        for i in range(len(slot.hashes), full):
            block = block_hash(slot.hashes[-1] if slot.hashes else None, slot.held[i * size : (i + 1) * size], slot.salt)
            if not self._holders[block] and first_new is None:
                first_new = i  # blocks are chained, so that all that follow are new as well
            self._holders[block] += 1
            slot.hashes.append(block)
        if first_new is not None:
            self._on_kv([BlocksStored(slot.hashes[first_new:], slot.hashes[first_new - 1] if first_new else None, slot.held[first_new * size : full * size],
                                      cache_salt=slot.salt)])  # fmt: skip


def block_hash(parent: int | None, tokens: Sequence[int], salt: str | None) -> int:
    """64 bits that name a block by its tokens and all that come before it."""
    seed = f"salt:{salt}".encode() if parent is None else parent.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(seed + array("I", tokens).tobytes(), digest_size=8).digest(), "little")


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree: whole slices compare in C, so halve rather than walk."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
