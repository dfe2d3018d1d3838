"""What every engine checks before it starts: is the request sound, was it promised, does it fit?"""

from __future__ import annotations

from dynamo_core.cards import ModelCard
from dynamo_core.errors import PromptTooLong, RequestError
from dynamo_core.types import Request, Sampling

MAX_CHOICES = 128
"""Of one request: each takes memory and time before the first token, on every worker that the request moves to when one does not survive it."""


def admit(request: Request, card: ModelCard) -> int:
    """Check a request against what the card promises, and return how many tokens may be generated from here on.

    That is `max_tokens`, or the card's default, cut to what the context length leaves.

    :raises RequestError: the request is unsound, needs what the card does not promise, or does not fit.
    """
    known = len(request.token_ids)
    if not 0 <= request.resumed < known:
        raise RequestError("the prompt has no tokens", param="prompt")
    _check_sampling(request.sampling)
    _check_promises(request, card)
    stops = request.stops
    if stops.max_tokens is not None and stops.max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1: {stops.max_tokens}", param="max_tokens")
    if stops.min_tokens < 0 or (stops.max_tokens is not None and stops.min_tokens > stops.max_tokens):
        raise RequestError(f"min_tokens must be from 0 to max_tokens: {stops.min_tokens}", param="min_tokens")
    room = card.context_length - known
    if room < 1:
        raise PromptTooLong(f"the prompt has {known} tokens; the model's context of {card.context_length} leaves no room for an answer", param="prompt")
    if stops.max_tokens is not None:
        return min(stops.max_tokens, room)
    if card.default_max_tokens is not None:
        return min(max(1, card.default_max_tokens - request.resumed), room)
    return room


def _check_sampling(sampling: Sampling) -> None:
    for name, value, low, high in (
        ("temperature", sampling.temperature, 0.0, float("inf")),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("repetition_penalty", sampling.repetition_penalty, 0.0, float("inf")),
    ):
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} must be from {low:g} to {high:g}: {value:g}", param=name)
    if sampling.top_k is not None and sampling.top_k < -1:
        raise RequestError(f"top_k must be -1 (off), 0 (off) or positive: {sampling.top_k}", param="top_k")
    if not 1 <= sampling.n <= MAX_CHOICES:
        raise RequestError(f"n must be from 1 to {MAX_CHOICES}: {sampling.n}", param="n")


def _check_promises(request: Request, card: ModelCard) -> None:
    for capability, needed in (
        ("n", request.sampling.n > 1),
        ("logprobs", request.logprobs is not None),
        ("prompt_logprobs", request.prompt_logprobs is not None),
        ("logit_bias", bool(request.sampling.logit_bias)),
        ("guided", request.guided is not None),
        ("lora", request.adapter is not None and request.adapter != card.adapter),
        ("media", bool(request.media)),
    ):
        if needed and capability not in card.capabilities:
            raise RequestError(f"model {card.name!r} on {card.engine or 'this engine'} does not support {capability}", param=capability)
