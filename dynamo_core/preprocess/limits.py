"""Whether a prompt fits the model: checked before any worker sees it."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_core.cards import ModelCard
from dynamo_core.errors import PromptTooLong, RequestError


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
