"""The engine `llamacpp`: the contract of `dynamo_core.engines` on a llama.cpp that runs in this process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
from attrs import validators as v

from dynamo_core.cards import Artifact, ModelCard
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext, KvEvent, admit
from dynamo_core.errors import ConfigError, EngineDead, Problem, RequestError
from dynamo_core.types import Output, Request, Sampling
from dynamo_llamacpp import sampling
from dynamo_llamacpp.choice import Choice, Model
from dynamo_llamacpp.gguf import read_metadata
from dynamo_llamacpp.merge import merged
from dynamo_llamacpp.native import Native, Settings
from dynamo_llamacpp.pieces import Pieces
from dynamo_llamacpp.resolve import BUNDLED, resolve
from dynamo_llamacpp.slots import Slot, Slots
from dynamo_llamacpp.tokenizer import Vocabulary, byte_pieces, vocabulary

BLOCK_SIZE = 32
"""Tokens of a block in KV events. llama.cpp itself caches token by token."""
_DEFAULT_CONTEXT = 4096
_HEARTBEAT = 2.0
_LOAD_INTERVAL = 0.1


@attrs.define(eq=False)
class LlamaCppEngine:
    """llama.cpp in the worker process: GGUF models on the CPU, with continuous batching and prefix caching."""

    model: str = BUNDLED
    """`smollm2` (98 MB, fetched once), the path of a .gguf file, or a Hugging Face id: org/name[:file.gguf]."""
    slots: int = attrs.field(default=4, validator=[v.ge(1), v.le(256)])
    """Requests that run at once; each has a cache of its own."""
    context: int | None = attrs.field(default=None, validator=v.optional(v.ge(16)))
    """Tokens of one request, prompt plus output. Default: 4096, or less if the model was trained for less."""
    threads: int = attrs.field(default=1, validator=v.ge(1))
    """CPU threads that compute."""
    batch: int = attrs.field(default=256, validator=[v.ge(32), v.le(4096)])
    """Prompt tokens computed in one step: more is faster, less lets other requests in sooner."""
    _running: _Running | None = attrs.field(default=None, init=False, repr=False)

    async def start(self, context: EngineContext) -> ModelCard:
        heartbeat = _Heartbeat(context)
        beating = asyncio.create_task(heartbeat.run())
        try:
            path = await asyncio.to_thread(resolve, self.model, context.cache_dir, heartbeat.phase)
            heartbeat.phase("read", None)
            metadata = await asyncio.to_thread(read_metadata, path)
            vocab = await asyncio.to_thread(vocabulary, metadata)
            tokens = self._context(metadata, path)
            heartbeat.phase("load", None)
            native = await asyncio.to_thread(Native, Settings(path, self.slots, tokens, self.threads, self.batch), asyncio.get_running_loop())
        finally:
            beating.cancel()
        model = Model(native, Pieces(byte_pieces(vocab)), vocab.ends, vocab.forbidden)
        card = self._card(metadata, vocab, path, tokens)
        self._running = _Running(card, vocab.tokenizer_json, model, context, self.slots)
        context.progress("ready", 1.0)
        return card

    def artifact(self, digest: str) -> bytes:
        if self._running is None or self._running.card.tokenizer is None or digest != self._running.card.tokenizer.digest:
            raise KeyError(digest)
        return self._running.tokenizer

    async def generate(self, request: Request, context: Context) -> AsyncGenerator[Output, None]:
        if self._running is None:
            raise EngineDead("llama.cpp is not running")
        async with aclosing(self._running.generate(request)) as outputs:
            async for output in outputs:
                yield output

    async def probe(self) -> None:
        """One token of real work. It repeats the last token that an idle slot holds, which leaves its cache as it was."""
        if self._running is None:
            raise EngineDead("llama.cpp is not running")
        await self._running.probe()

    async def stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.stop()

    def _context(self, metadata: dict[str, Any], path: Path) -> int:
        trained: int | None = metadata.get(f"{metadata.get('general.architecture')}.context_length")
        if self.context is None:
            return min(_DEFAULT_CONTEXT, trained or _DEFAULT_CONTEXT)
        if trained is not None and self.context > trained:
            what = f"context = {self.context} is more than the {trained} tokens that {path.name} was trained for"
            raise ConfigError(Problem(what, remedy=f"set context to {trained} or less"))
        return self.context

    def _card(self, metadata: dict[str, Any], vocab: Vocabulary, path: Path, context: int) -> ModelCard:
        texts = {"bos_token": vocab.bos, "eos_token": vocab.eos}
        bundled = self.model == BUNDLED
        template: str | None = metadata.get("tokenizer.chat_template")
        return ModelCard(
            name=path.stem if self.model.endswith(".gguf") else self.model,
            aliases=("SmolLM2-135M-Instruct",) if bundled else (),
            surfaces=("chat", "completions") if template else ("completions",),
            context_length=context,
            vocab_size=len(vocab.tokens),
            eos_token_ids=vocab.ends,
            tokenizer=Artifact.of("tokenizer.json", vocab.tokenizer_json),
            chat_template=template,
            template_tokens={name: vocab.tokens[token] for name, token in texts.items() if token is not None},
            add_bos=vocab.add_bos,
            defaults=_defaults(metadata, bundled),
            block_size=BLOCK_SIZE,
            total_blocks=self.slots * -(-context // BLOCK_SIZE),
            max_sequences=self.slots,
            max_batched_tokens=self.batch,
            kv_events=True,
            capabilities=("logprobs", "logit_bias", "n", *(("guided",) if _can_constrain(vocab) else ())),
            engine=f"llama.cpp (xllamacpp {version('xllamacpp')})",
        )


_constrained: list[bytes] = []
"""The vocabulary that this process constrains with, once it is known."""


def _can_constrain(vocab: Vocabulary) -> bool:
    """llama.cpp keeps the first vocabulary that it constrained with for as long as the process lives, and aborts on another.

    A worker has one model, so that this matters only to programs that load several.
    """
    if vocab.forbidden is None:
        return False
    digest = hashlib.sha256(vocab.tokenizer_json).digest()
    if not _constrained:
        _constrained.append(digest)
    return _constrained == [digest]


def _defaults(metadata: dict[str, Any], bundled: bool) -> Sampling:
    """What the file recommends, else what llama.cpp does; the bundled model's authors recommend colder sampling."""
    if bundled:
        return Sampling(temperature=0.2, top_p=0.9)
    return Sampling(
        temperature=metadata.get("general.sampling.temp", 0.8),
        top_p=metadata.get("general.sampling.top_p", 0.95),
        top_k=metadata.get("general.sampling.top_k", 40),
        min_p=metadata.get("general.sampling.min_p", 0.05),
    )


# ------------------------------------------------------------------ while it runs


class _Running:
    """A loaded model and the requests on it."""

    def __init__(self, card: ModelCard, tokenizer: bytes, model: Model, context: EngineContext, slots: int) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self._model = model
        self._context = context
        self._slots = Slots(slots, card.block_size, -(-card.context_length // card.block_size), self._load_changed, self._kv_changed)
        self._load_timer: asyncio.TimerHandle | None = None
        self._load_told = 0.0
        self._dead = False

    def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        limit = admit(request, self.card)
        vocab = self.card.vocab_size or 0
        if min(request.token_ids) < 0 or max(request.token_ids) >= vocab:
            raise RequestError(f"the prompt has a token that is not one of the model's {vocab}", param="prompt")
        body = sampling.settings(request, self.card)
        return merged([partial(self._choice, request, body, limit, i) for i in range(request.sampling.n)])

    async def _choice(self, request: Request, body: dict[str, Any], limit: int, index: int) -> AsyncGenerator[Output, None]:
        if self._dead:
            raise EngineDead("llama.cpp was stopped")
        slot = await self._slots.take(request.token_ids, request.cache_salt, request.hints.priority)
        choice = Choice(self._model, request, body, index, limit, slot.id, slot.reuse)
        try:
            async with aclosing(choice.outputs()) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._slots.give_back(slot, choice.held)

    async def probe(self) -> None:
        slot = self._slots.borrow()
        if slot is None:
            await self._model.native.next_step()
            return
        try:
            await self._probe_on(slot)
        finally:
            self._slots.return_borrowed(slot)

    async def _probe_on(self, slot: Slot) -> None:
        prompt = slot.held or [self.card.eos_token_ids[0] if self.card.eos_token_ids else 0]
        run = self._model.native.start(slot.id, {"prompt": prompt, "n_predict": 1, "stream": False})
        try:
            while await run.read():
                pass
        finally:
            await run.close()

    async def stop(self) -> None:
        self._dead = True
        error = EngineDead("llama.cpp was stopped")
        self._slots.fail(error)
        self._model.native.fail(error)
        if self._load_timer is not None:
            self._load_timer.cancel()
        await asyncio.to_thread(self._model.native.close)

    # -------------------------------------------------------------- what the worker publishes

    def _kv_changed(self, events: Sequence[KvEvent]) -> None:
        if not self._dead:
            self._context.kv_events(events, 0)

    def _load_changed(self) -> None:
        """Publish at once, or as soon as the last time is a tenth of a second ago."""
        if self._load_timer is None and not self._dead:
            loop = asyncio.get_running_loop()
            self._load_timer = loop.call_at(max(loop.time(), self._load_told + _LOAD_INTERVAL), self._publish_load)

    def _publish_load(self) -> None:
        self._load_timer = None
        self._load_told = asyncio.get_running_loop().time()
        self._context.load(self._slots.load())


class _Heartbeat:
    """Repeats the phase of a start that takes long."""

    def __init__(self, context: EngineContext) -> None:
        self._context = context
        self._now: tuple[str, float | None] = ("start", None)

    def phase(self, phase: str, fraction: float | None) -> None:
        self._now = (phase, fraction)
        self._context.progress(phase, fraction)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT)
            self._context.progress(*self._now)
