"""From a request to the body of one llama.cpp completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynamo_core.cards import ModelCard
from dynamo_core.errors import RequestError
from dynamo_core.types import Request
from dynamo_llamacpp.constraint import constraint

_BAN = -100.0
"""A bias of this or less forbids the token, as clients expect."""
_SEEDS = 2**32 - 1


def settings(request: Request, card: ModelCard) -> dict[str, Any]:
    """What stays the same in every run of this request. :raises RequestError: it asks for what llama.cpp does not have."""
    own, defaults, vocab_size = request.sampling, card.defaults, card.vocab_size or 0
    body: dict[str, Any] = {
        "stream": True,
        "temperature": _first(own.temperature, defaults.temperature, 1.0),
        "top_p": _first(own.top_p, defaults.top_p, 1.0),
        "top_k": max(0, _first(own.top_k, defaults.top_k, 0)),
        "min_p": _first(own.min_p, defaults.min_p, 0.0),
        "repeat_penalty": _first(own.repetition_penalty, defaults.repetition_penalty, 1.0),
        "frequency_penalty": _first(own.frequency_penalty, defaults.frequency_penalty, 0.0),
        "presence_penalty": _first(own.presence_penalty, defaults.presence_penalty, 0.0),
        "repeat_last_n": card.context_length,
    }
    for token in own.logit_bias or ():
        if not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias names token {token}; the model has {vocab_size}", param="logit_bias")
    if request.logprobs is not None:
        if not 0 <= request.logprobs <= vocab_size:
            raise RequestError(f"logprobs must be from 0 to {vocab_size}: {request.logprobs}", param="logprobs")
        body["n_probs"] = max(1, request.logprobs)
    if request.guided is not None:
        if request.resumed:
            raise RequestError("llama.cpp cannot continue a constrained output in its middle", param="guided")
        if request.stops.min_tokens:
            raise RequestError("llama.cpp cannot combine a constrained output with min_tokens", param="min_tokens")
        body |= constraint(request.guided)
    return body


def logit_bias(request: Request, banned: Sequence[int]) -> list[tuple[int, float | bool]]:
    """The request's own bias, and tokens that must not come now; `False` forbids."""
    own: Mapping[int, float] = request.sampling.logit_bias or {}
    return [(token, False if bias <= _BAN else bias) for token, bias in own.items()] + [(token, False) for token in banned]


def seed_of(request: Request, index: int, made: int) -> int | None:
    """The seed of a run that continues after `made` tokens. Each run draws afresh, so that each needs a seed of its own."""
    if request.sampling.seed is None:
        return None
    return (request.sampling.seed + 7919 * index + made) % _SEEDS


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
