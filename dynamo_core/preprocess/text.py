"""The preprocessor of any model that comes with a `tokenizer.json` and, for chat, a Jinja template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import PromptTooLong, RequestError
from dynamo_core.preprocess.assembler import TextAssembler, logprob_text
from dynamo_core.preprocess.pieces import Definition, most_characters
from dynamo_core.preprocess.template import ChatTemplate, compile_template
from dynamo_core.preprocess.tokenizer import TextTokenizer, threads
from dynamo_core.preprocess.vocabulary import Vocabulary
from dynamo_core.types import LogprobText, TextOptions

INLINE = 20_000
"""Characters of messages and tools up to which a template is rendered at once."""


class TextPreprocessor:
    """Renders, tokenizes and detokenizes for one model. Construct it in a thread: a large tokenizer takes a second."""

    def __init__(self, card: ModelCard, tokenizer_json: bytes) -> None:
        self.card = card
        definition = msgspec.json.decode(tokenizer_json, type=Definition)
        self._tokenizer = TextTokenizer(tokenizer_json, definition)
        self._vocabulary = Vocabulary(self._tokenizer.reference, definition.decoder)
        self._per_token = most_characters(definition)
        self._template: ChatTemplate | None = compile_template(card.chat_template) if card.chat_template else None

    async def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
                     add_generation_prompt: bool = True, continue_final_message: bool = False, template: str | None = None,
                     arguments: Mapping[str, Any] | None = None) -> str:
        """Messages to prompt text, byte for byte as `transformers.apply_chat_template` writes it.

        :param template: Jinja source instead of the card's; always rendered in a thread, since it may come from anybody.
        :param arguments: more variables for the template; they win over the card's `template_tokens`.
        :raises RequestError: there is no template, or it refuses these messages, or it goes on for too long.
        """
        chosen = compile_template(template) if template is not None else self._template
        if chosen is None:
            raise RequestError(f"model {self.card.name} has no chat template; use /v1/completions, or send a template", param="messages")

        def render() -> str:
            return chosen.render(messages, tools=tools, add_generation_prompt=add_generation_prompt,
                                 continue_final_message=continue_final_message, variables={**self.card.template_tokens, **(arguments or {})})

        if template is None and _size((messages, tools, arguments), INLINE) < INLINE:
            return render()
        return await asyncio.get_running_loop().run_in_executor(threads, render)

    def _too_long(self, characters: int) -> bool:
        return self._per_token is not None and characters > self._per_token * self.card.context_length

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to token ids; a long text is tokenized in a thread, so the event loop goes on.

        :raises PromptTooLong: no tokenization of so long a text could fit, so none is tried.
        """
        if self._too_long(len(text)):
            limit = self.card.context_length
            raise PromptTooLong(f"this model's context length is {limit} tokens, too short for any prompt of {len(text):,} characters", param="prompt")
        return await self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def encode_pair(self, text: str, second: str) -> tuple[list[int], int | None]:
        """Two texts in the tokenizer's own form for pairs, and where the second begins, where it tells them apart.

        :raises PromptTooLong: no tokenization of so long texts could fit, so none is tried.
        """
        if self._too_long(len(text) + len(second)):
            raise PromptTooLong(f"this model's context length is {self.card.context_length} tokens, too short for any such pair of texts", param="documents")
        return await asyncio.get_running_loop().run_in_executor(threads, self._tokenizer.encode_pair, text, second)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def assembler(self, options: TextOptions, *, index: int = 0, prompt_tail: Sequence[int] = ()) -> TextAssembler:
        """For one choice. `prompt_tail`: the last few prompt tokens, so that the first text joins on as it should."""
        return TextAssembler(self._vocabulary, options, eos_token_ids=self.card.eos_token_ids, index=index, prompt_tail=prompt_tail)

    def logprob(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> LogprobText:
        return logprob_text(self._vocabulary, token_id, logprob, top)


def _size(value: Any, limit: int) -> int:
    """Roughly how many characters a template has to go through; stops counting at `limit`."""
    total, todo = 0, [value]
    while todo and total < limit:
        item = todo.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 20 * len(item)
            todo.extend(item.values())
        elif isinstance(item, (list, tuple)):
            total += 20 * len(item)
            todo.extend(item)
    return total
