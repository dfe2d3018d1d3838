"""The engine that answers with the prompt: for first steps, tests, and stacks that must run with nothing installed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import islice

import attrs
from attrs import validators as v

from dynamo_core import __version__
from dynamo_core.cards import Artifact, ModelCard
from dynamo_core.context import Context
from dynamo_core.engines import byte_tokenizer
from dynamo_core.engines.admission import admit
from dynamo_core.engines.contract import EngineContext
from dynamo_core.errors import EngineDead
from dynamo_core.types import Output, Request

_FILLER = [ord(".")]
"""What a prompt without any text is answered with."""


@attrs.define
class EchoEngine:
    """Repeats the prompt, without its special tokens, until `max_tokens`.

    A request without `max_tokens` gets the prompt once, closed by the end-of-sequence token.
    """

    model: str = "echo"
    """Name of the model that it claims to serve."""
    delay: float = attrs.field(default=0.0, validator=v.ge(0))
    """Seconds before each token."""
    context_length: int = attrs.field(default=8192, validator=v.ge(2))
    """Prompt plus output, in tokens. One token is one byte of text."""
    _card: ModelCard | None = attrs.field(default=None, init=False)
    _tokenizer: bytes = attrs.field(factory=byte_tokenizer.tokenizer_json, init=False, repr=False)
    _pauses: set[asyncio.Future[None]] = attrs.field(factory=set, init=False, repr=False)

    async def start(self, context: EngineContext) -> ModelCard:
        self._card = card = ModelCard(
            name=self.model,
            context_length=self.context_length,
            vocab_size=byte_tokenizer.VOCAB_SIZE,
            eos_token_ids=(byte_tokenizer.TURN_END, byte_tokenizer.END_OF_TEXT),
            tokenizer=Artifact.of("tokenizer.json", self._tokenizer),
            chat_template=byte_tokenizer.CHAT_TEMPLATE,
            template_tokens={"eos_token": "<|im_end|>"},
            engine=f"echo {__version__}",
        )
        context.progress("ready", 1.0)
        return card

    def artifact(self, digest: str) -> bytes:
        if self._card is None or self._card.tokenizer is None or digest != self._card.tokenizer.digest:
            raise KeyError(digest)
        return self._tokenizer

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if self._card is None:
            raise EngineDead("the echo engine is not running")
        limit = admit(request, self._card)
        stops = request.stops
        text = [token for token in islice(request.token_ids, len(request.token_ids) - request.resumed) if token < byte_tokenizer.END_OF_TEXT] or _FILLER
        natural = max(len(text) - request.resumed, stops.min_tokens, 0)
        ends_at = limit if stops.max_tokens is not None or stops.ignore_eos else natural
        stop_ids = frozenset(stops.stop_token_ids)
        for made in range(limit):
            await self._pause()
            if made == ends_at:
                yield Output([byte_tokenizer.TURN_END], finish_reason="stop")
                return
            token = text[(request.resumed + made) % len(text)]
            if token in stop_ids and made >= stops.min_tokens:
                yield Output([token], finish_reason="stop", stop_reason=token)
                return
            yield Output([token], finish_reason="length" if made + 1 == limit else None)

    async def stop(self) -> None:
        self._card = None
        for pause in self._pauses:
            if not pause.done():
                pause.set_exception(EngineDead("the echo engine was stopped"))

    async def _pause(self) -> None:
        """Wait `delay`. :raises EngineDead: the engine was stopped, now or while nobody read."""
        if self._card is None:
            raise EngineDead("the echo engine was stopped")
        loop = asyncio.get_running_loop()
        pause: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(self.delay, _wake, pause) if self.delay else loop.call_soon(_wake, pause)
        self._pauses.add(pause)
        try:
            await pause
        finally:
            timer.cancel()
            self._pauses.discard(pause)


def _wake(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)
