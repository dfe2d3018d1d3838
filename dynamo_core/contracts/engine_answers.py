"""What the engine kit sees of an engine: what it said since its start, its answers, its cache events; and what holds for each."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.engines import BlocksCleared, BlocksRemoved, BlocksStored, Engine, EngineContext, KvEvent
from dynamo_core.types import Load, Output, Request


@attrs.define
class Running:
    """An engine that was started, and what it has told its worker since."""

    engine: Engine
    card: ModelCard
    loads: list[Load] = attrs.field(factory=list)
    kv_events: list[KvEvent] = attrs.field(factory=list)
    deaths: list[str] = attrs.field(factory=list)
    progress: list[float] = attrs.field(factory=list)
    """When it reported progress, by `time.monotonic()`; the first is when `start` was called, the last when it returned."""


async def start(engine: Engine) -> Running:
    """Start an engine, recording all it says."""
    loads: list[Load] = []
    events: list[KvEvent] = []
    deaths: list[str] = []
    progress = [time.monotonic()]
    context = EngineContext(
        progress=lambda phase, fraction: progress.append(time.monotonic()), kv_events=lambda new, rank: events.extend(new),
        load=loads.append, died=deaths.append, name="contract",
    )
    card = await engine.start(context)
    progress.append(time.monotonic())
    return Running(engine, card, loads, events, deaths, progress)


@attrs.define
class Answer:
    request: Request
    outputs: list[Output] = attrs.field(factory=list)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for output in self.outputs if output.index == index for token in output.token_ids]

    def finish(self, index: int = 0) -> Output:
        return next(output for output in self.outputs if output.index == index and output.finish_reason is not None)

    def check(self, card: ModelCard) -> None:
        """Everything that holds for every answer."""
        request, stops = self.request, self.request.stops
        assert {output.index for output in self.outputs} == set(range(request.sampling.n)), "G2: outputs of every choice, and of no other"
        for index in range(request.sampling.n):
            mine = [output for output in self.outputs if output.index == index]
            finished = [output.finish_reason is not None for output in mine]
            assert finished == [False] * (len(mine) - 1) + [True], "G2: the last output, and only it, has the finish reason"
            tokens, last = self.tokens(index), mine[-1]
            assert all(0 <= token < (card.vocab_size or 2**31) for token in tokens), "G2: token ids of the vocabulary"
            assert stops.max_tokens is None or len(tokens) <= stops.max_tokens, "G4: at most max_tokens"
            assert len(request.token_ids) + len(tokens) <= card.context_length, "G4: within the context length"
            ends = {*stops.stop_token_ids, *(() if stops.ignore_eos else card.eos_token_ids)}
            assert not ends & set(tokens[stops.min_tokens : -1]), "G4: nothing follows a token that ends the answer"
            if last.finish_reason == "stop":
                assert tokens, "G4: the token that ended the answer is part of it"
                assert tokens[-1] in ends, "G4: `stop` means that such a token ended it"
                assert len(tokens) >= stops.min_tokens, "G4: at least min_tokens"
                named = None if tokens[-1] in card.eos_token_ids else tokens[-1]
                assert last.stop_reason == named, "G4: stop_reason is the stop token id, or None for end of sequence"
            else:
                assert last.finish_reason == "length", f"G2: finished by {last.finish_reason!r}"
                room = card.context_length - len(request.token_ids)
                wanted = min(room, stops.max_tokens if stops.max_tokens is not None else card.default_max_tokens or room)
                assert len(tokens) in (wanted, room - 1), "G4: `length` means that max_tokens or the context length was reached"
        cached = [output.cached_tokens for output in self.outputs if output.cached_tokens is not None]
        assert all(0 <= count < len(request.token_ids) for count in cached), "G2: cached_tokens are some of the prompt, and never all"


def replay_kv_events(events: Sequence[KvEvent], block_size: int) -> list[list[int]]:
    """The token chains in a cache after `events`, which must make sense one by one."""
    chains: dict[int | bytes, list[int]] = {}
    every: list[list[int]] = []
    for event in events:
        if isinstance(event, BlocksStored):
            assert len(event.token_ids) == len(event.hashes) * block_size, "tokens of whole blocks"
            assert event.parent is None or event.parent in chains, "stored below a block that was never stored"
            tokens = chains[event.parent] if event.parent is not None else []
            for i, block in enumerate(event.hashes):
                tokens = [*tokens, *event.token_ids[i * block_size : (i + 1) * block_size]]
                assert chains.get(block) in (None, tokens), "one hash for two contents"
                chains[block] = tokens
                every.append(tokens)
        elif isinstance(event, BlocksRemoved):
            for block in event.hashes:
                assert chains.pop(block, None) is not None, "removed what was not there"
        elif isinstance(event, BlocksCleared):
            chains.clear()
    return every
