"""Requests as the body of `/v1/completions`, under vLLM's names where OpenAI has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import RequestError
from dynamo_core.types import Guided, Request

_EXTRA = frozenset({"allowed_token_ids", "bad_words", "thinking_token_budget"})
"""Options of the server that `Request.extra["openai"]` may carry."""

_encode = msgspec.json.Encoder().encode


def body_of(request: Request, card: ModelCard, model: str, limit: int, *, id: str, priorities: bool) -> bytes:
    """What is sent. What a request leaves open is left to the server. :param limit: tokens to generate. :raises RequestError: the server has no word for it."""
    own, stops = request.sampling, request.stops
    streams = request.prompt_logprobs is None
    body: dict[str, Any] = {
        "model": model, "prompt": request.token_ids, "max_tokens": limit, "stream": streams, "return_token_ids": True, "request_id": id,
        **_extra(request.extra.get("openai") or {}),
    }  # fmt: skip
    if streams:
        body["stream_options"] = {"include_usage": True}
    else:
        body["prompt_logprobs"] = request.prompt_logprobs  # vLLM has them in answers that are no streams only
    if request.logprobs is not None:
        body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    if stops.min_tokens:
        body["min_tokens"] = min(stops.min_tokens, limit)
    if stops.stop_token_ids:
        body["stop_token_ids"] = stops.stop_token_ids
    if stops.ignore_eos:
        body["ignore_eos"] = True
    if own.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in own.logit_bias.items()}
    if request.guided is not None:
        body["structured_outputs"] = _structured(request, request.guided)
    if request.cache_salt is not None:
        body["cache_salt"] = request.cache_salt
    if priorities and request.hints.priority:
        body["priority"] = -request.hints.priority  # for vLLM, lower is more urgent
    if own.n != 1:
        body["n"] = own.n
    defaults = card.defaults
    for name in ("temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        if (value := getattr(own, name)) is not None or (value := getattr(defaults, name)) is not None:
            body[name] = value
    return _encode(body)


def _structured(request: Request, guided: Guided) -> dict[str, Any]:
    if request.resumed:
        raise RequestError("a server cannot continue a constrained output in its middle", param="guided")
    if guided.json_schema is not None:
        return {"json": guided.json_schema}
    if guided.json_object:
        return {"json_object": True}
    if guided.regex is not None:
        return {"regex": guided.regex}
    if guided.choice is not None:
        return {"choice": guided.choice}
    return {"grammar": guided.grammar}


def _extra(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := sorted(set(options) - _EXTRA):
        raise RequestError(f"there is no option {unknown[0]!r} for a request; there are {', '.join(sorted(_EXTRA))}", param="extra")
    return options
