"""Requests into vLLM's parameters, and vLLM's outputs into ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dynamo_core.cards import ModelCard
from dynamo_core.errors import EngineFailed, RequestError
from dynamo_core.types import Guided, Output, Request, TokenLogprob
from dynamo_vllm.vllm_api import Vllm

_EXTRA = frozenset({"allowed_token_ids", "bad_words", "thinking_token_budget"})
"""Options of vLLM that `Request.extra["vllm"]` may carry."""


def sampling_params(vllm: Vllm, request: Request, card: ModelCard, limit: int) -> Any:
    """:raises RequestError: vLLM does not take it."""
    own, stops, defaults = request.sampling, request.stops, card.defaults
    given: dict[str, Any] = {
        "temperature": own.temperature if own.temperature is not None else defaults.temperature,
        "top_p": own.top_p if own.top_p is not None else defaults.top_p,
        "top_k": own.top_k if own.top_k is not None else defaults.top_k,
        "min_p": own.min_p if own.min_p is not None else defaults.min_p,
        "frequency_penalty": own.frequency_penalty if own.frequency_penalty is not None else defaults.frequency_penalty,
        "presence_penalty": own.presence_penalty if own.presence_penalty is not None else defaults.presence_penalty,
        "repetition_penalty": own.repetition_penalty if own.repetition_penalty is not None else defaults.repetition_penalty,
        "seed": own.seed,
        "logit_bias": own.logit_bias,
        "stop_token_ids": list(stops.stop_token_ids) or None,
        "logprobs": request.logprobs,
        "prompt_logprobs": request.prompt_logprobs,
        "structured_outputs": _structured(vllm, request) if request.guided is not None else None,
        "extra_args": _hand_over(request),
        **_extra(request.extra.get("vllm") or {}),
    }
    params = {name: value for name, value in given.items() if value is not None}
    try:
        return vllm.SamplingParams(
            n=own.n, max_tokens=limit, min_tokens=min(stops.min_tokens, limit), ignore_eos=stops.ignore_eos, detokenize=False,
            output_kind=vllm.RequestOutputKind.DELTA, **params,
        )  # fmt: skip
    except (ValueError, TypeError) as e:
        raise RequestError(str(e)) from e


def _hand_over(request: Request) -> dict[str, Any] | None:
    """What other workers have said of where KV blocks, and encoded images, are."""
    found = {"kv_transfer_params": request.transfer} if request.transfer is not None else {}
    encoded = [item["encoded"].get("ec", {}) for item in request.media or () if "encoded" in item]
    if any(encoded):
        found["ec_transfer_params"] = {name: where for item in encoded for name, where in item.items()}
    return found or None


def _extra(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := sorted(set(options) - _EXTRA):
        raise RequestError(f"vllm has no option {unknown[0]!r} for a request; it has {', '.join(sorted(_EXTRA))}", param="extra")
    return options


def _structured(vllm: Vllm, request: Request) -> Any:
    guided: Guided = request.guided or Guided()
    if request.resumed:
        raise RequestError("vLLM cannot continue a constrained output in its middle", param="guided")
    try:
        return vllm.StructuredOutputsParams(
            json=guided.json_schema, regex=guided.regex, grammar=guided.grammar, json_object=True if guided.json_object else None,
            choice=list(guided.choice) if guided.choice is not None else None,
        )  # fmt: skip
    except (ValueError, TypeError) as e:
        raise RequestError(str(e), param="guided") from e


class Reader:
    """Turns the steps of one request into outputs."""

    __slots__ = ("_ends", "_logprobs", "_places", "_prompt", "_prompt_logprobs", "_prompt_told", "_told")

    def __init__(self, request: Request, card: ModelCard, places: list[list[int]] | None = None) -> None:
        self._places = places
        self._ends = card.eos_token_ids
        self._logprobs = request.logprobs
        self._prompt_logprobs = request.prompt_logprobs
        self._prompt = request.token_ids
        self._prompt_told = request.prompt_logprobs is None
        self._told = False

    def read(self, step: Any) -> Iterator[Output]:
        """The outputs of one `RequestOutput`, at most one for each choice. :raises EngineFailed: vLLM gave the request up."""
        for choice in step.outputs:
            reason: Any = choice.finish_reason
            tokens = list(choice.token_ids)
            if not tokens and reason is None:
                continue
            if reason == "error":
                raise EngineFailed("vLLM could not go on with this request; its log says why")
            output = Output(tokens, choice.index, reason if reason != "repetition" else "stop")
            if reason is not None and choice.stop_reason not in self._ends:
                output.stop_reason = choice.stop_reason
            if self._logprobs is not None and choice.logprobs:
                k = self._logprobs
                output.logprobs = [_position(token, found, k) for token, found in zip(tokens, choice.logprobs, strict=False)]
            if not self._told:
                self._told = True
                output.cached_tokens = step.num_cached_tokens
                output.places = self._places
            if not self._prompt_told and step.prompt_logprobs:
                self._prompt_told = True
                k = self._prompt_logprobs or 0
                pairs = zip(self._prompt, step.prompt_logprobs, strict=False)
                output.prompt_logprobs = [None if found is None else _position(token, found, k) for token, found in pairs]
            if reason is not None and step.kv_transfer_params:
                output.transfer = step.kv_transfer_params
            yield output


def _position(token: int, found: Mapping[int, Any], k: int) -> TokenLogprob:
    """vLLM lists the k best and the token itself, which may be one of them."""
    best = sorted(((entry.rank, other, entry.logprob) for other, entry in found.items() if entry.rank <= k)) if k else []
    return TokenLogprob(token, found[token].logprob, [(other, logprob) for _, other, logprob in best[:k]])
