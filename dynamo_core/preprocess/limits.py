"""Whether a prompt fits the model: checked before any worker sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamo_core.cards import ModelCard
from dynamo_core.errors import PromptTooLong, RequestError
from dynamo_core.types import Request


def fit(card: ModelCard, prompt_tokens: int, max_tokens: int | None) -> int:
    """How many tokens may be generated: `max_tokens`, else the model's default, else all that is left.

    :raises PromptTooLong: prompt and `max_tokens` together exceed the context length.
    """
    limit = card.context_length
    left = limit - prompt_tokens
    if max_tokens is not None:
        if max_tokens > left:
            raise PromptTooLong(f"this model's context length is {limit} tokens, but the request needs {prompt_tokens + max_tokens}: "
                                f"{prompt_tokens} in the prompt and {max_tokens} to generate; shorten the prompt or lower max_tokens", param="max_tokens"
                                if left > 0 else "prompt")
        return max_tokens
    if left < 1:
        raise PromptTooLong(f"this model's context length is {limit} tokens, but the prompt alone has {prompt_tokens}; shorten it", param="prompt")
    return left if card.default_max_tokens is None else min(left, card.default_max_tokens)


def check_token_ids(card: ModelCard, token_ids: Sequence[int]) -> None:
    """:raises RequestError: an id is not in the vocabulary."""
    if not token_ids:
        return
    low, high = min(token_ids), max(token_ids)
    if low < 0:
        raise RequestError(f"token id {low} is negative", param="prompt")
    if card.vocab_size is not None and high >= card.vocab_size:
        raise RequestError(f"token id {high} is not in the vocabulary of {card.name}, which has {card.vocab_size} tokens", param="prompt")


def check_media(card: ModelCard, request: Request) -> None:
    """What is said of where images are is used to lay the prompt out, so that it must be near the truth.

    :raises RequestError: an image begins outside of the prompt, or they are longer than the context.
    """
    total = 0
    for item in request.media or ():
        start, length, runs = item.get("start", 0), item.get("length", 1), item.get("runs") or ()
        numbers: list[Any] = [start, length, *runs] if isinstance(runs, list | tuple) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(runs) % 2:
            raise RequestError("an image has `start`, `length` and `runs` in whole numbers of tokens", param="media")
        total += max(length, sum(runs[1::2]))
        if start > len(request.token_ids):
            raise RequestError(f"an image begins at token {start} of a prompt of {len(request.token_ids)}", param="media")
        if total > card.context_length:
            raise RequestError(f"the images have {total} tokens, and the model's context {card.context_length}", param="media")
