"""From what the client wrote to what the fleet understands, with every refusal that the model card calls for."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import RequestError
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import Body, EmbeddingBody, Extension, PoolingBody
from dynamo_core.frontend.parse import check_nesting
from dynamo_core.preprocess.limits import fit
from dynamo_core.types import Guided, Hints, Request, Sampling, Stops, TextOptions

_NO_EXTENSION = Extension()


@attrs.frozen
class Wanted:
    """Everything about a request but its prompt."""

    sampling: Sampling
    stops: Stops
    text: TextOptions
    hints: Hints
    guided: Guided | None
    logprobs: int | None
    prompt_logprobs: int | None
    cache_salt: str | None

    def request(self, id: str, card: ModelCard, token_ids: list[int]) -> Request:
        """Whether the tokens are of this model's vocabulary is for whoever generates to check. :raises RequestError: the prompt is empty, or too long."""
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        stops = msgspec.structs.replace(self.stops, max_tokens=fit(card, len(token_ids), self.stops.max_tokens))
        return Request(
            id=id,
            model=card.name,
            token_ids=token_ids,
            sampling=self.sampling,
            stops=stops,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            guided=self.guided,
            hints=self.hints,
            adapter=card.adapter,
            cache_salt=self.cache_salt,
        )


def extension(body: Body | EmbeddingBody | PoolingBody) -> Extension:
    if body.dynamo is not None and body.nvext is not None:
        raise RequestError("`dynamo` and `nvext` are two names of one object; send one of them", param="nvext")
    return body.dynamo or body.nvext or _NO_EXTENSION


def convert(
    body: Body, card: ModelCard, exchange: Exchange, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None, direct_routing: bool
) -> Wanted:
    """:raises RequestError: fields contradict each other, or the model cannot do it."""
    ext = extension(body)
    n = body.n or 1
    if n > 1 and body.temperature == 0:
        raise RequestError("n must be 1 when temperature is 0: all choices would be the same", param="n")
    if max_tokens is not None and body.min_tokens is not None and body.min_tokens > max_tokens:
        raise RequestError(f"min_tokens is {body.min_tokens}, more than max_tokens, which is {max_tokens}", param="min_tokens")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not given with streams; leave out `stream`", param="prompt_logprobs")
    guided = _guided(body)
    for needed, capability, param in (
        (n > 1, "n", "n"),
        (logprobs is not None, "logprobs", "logprobs"),
        (prompt_logprobs is not None, "prompt_logprobs", "prompt_logprobs"),
        (guided is not None, "guided", "response_format"),
        (bool(body.logit_bias), "logit_bias", "logit_bias"),
    ):
        if needed and capability not in card.capabilities:
            raise RequestError(f"{param}: the engine of model {card.name!r} does not support {capability}", param=param)
    if body.logit_bias:
        _check_vocabulary(card, body.logit_bias, "logit_bias")
    strings, ids = _stop(body)
    _check_vocabulary(card, ids, "stop_token_ids")
    return Wanted(
        sampling=_sampling(body, card, n),
        stops=Stops(max_tokens=max_tokens, min_tokens=body.min_tokens or 0, stop_token_ids=ids, ignore_eos=bool(body.ignore_eos)),
        text=TextOptions(
            stop=strings,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            logprobs=logprobs is not None,
        ),
        hints=hints(body, ext, exchange, direct_routing=direct_routing),
        guided=guided,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        cache_salt=ext.cache_salt if ext.cache_salt is not None else body.cache_salt,
    )


def _check_vocabulary(card: ModelCard, ids: Any, param: str) -> None:
    top = 2**31 if card.vocab_size is None else card.vocab_size
    for token_id in ids:
        if not 0 <= token_id < top:
            raise RequestError(f"{param}: {str(token_id)[:32]} is not a token id of {card.name!r}, which has 0 to {top - 1}", param=param)


def _sampling(body: Body, card: ModelCard, n: int) -> Sampling:
    default = card.defaults
    return Sampling(
        temperature=default.temperature if body.temperature is None else body.temperature,
        top_p=default.top_p if body.top_p is None else body.top_p,
        top_k=default.top_k if body.top_k is None else body.top_k,
        min_p=default.min_p if body.min_p is None else body.min_p,
        seed=body.seed,
        frequency_penalty=default.frequency_penalty if body.frequency_penalty is None else body.frequency_penalty,
        presence_penalty=default.presence_penalty if body.presence_penalty is None else body.presence_penalty,
        repetition_penalty=default.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.logit_bias or None,
        n=n,
    )


def _stop(body: Body) -> tuple[tuple[str, ...], tuple[int, ...]]:
    ids = tuple(body.stop_token_ids or ())
    if body.stop is None:
        return (), ids
    if isinstance(body.stop, str):
        return (body.stop,), ids
    strings = tuple(item for item in body.stop if isinstance(item, str))
    numbers = tuple(item for item in body.stop if not isinstance(item, str))
    if strings and numbers:
        raise RequestError("stop: use strings or token ids, not both in one list", param="stop")
    return strings, ids + numbers


def _guided(body: Body) -> Guided | None:
    found: list[Guided] = []
    if (form := body.response_format) is not None:
        if form.type == "json_schema":
            if form.json_schema is None:
                raise RequestError("response_format: type json_schema needs the field `json_schema`", param="response_format.json_schema")
            check_nesting(form.json_schema.schema, "response_format.json_schema")
            found.append(Guided(json_schema=form.json_schema.schema))
        elif form.type == "json_object":
            found.append(Guided(json_object=True))
    if body.guided_json is not None:
        found.append(Guided(json_schema=_schema(body.guided_json)))
    if body.guided_regex is not None:
        found.append(Guided(regex=body.guided_regex))
    if body.guided_grammar is not None:
        found.append(Guided(grammar=body.guided_grammar))
    if body.guided_choice is not None:
        found.append(Guided(choice=tuple(body.guided_choice)))
    if len(found) > 1:
        raise RequestError("only one of response_format, guided_json, guided_regex, guided_grammar and guided_choice may be given", param="response_format")
    return found[0] if found else None


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            parsed: Any = msgspec.json.decode(given)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise RequestError("guided_json is not valid JSON", param="guided_json") from None
        if not isinstance(parsed, dict):
            raise RequestError("guided_json must be a JSON schema object", param="guided_json")
        given = parsed
    check_nesting(given, "guided_json")
    return given


def hints(body: Body | EmbeddingBody | PoolingBody, ext: Extension, exchange: Exchange, *, direct_routing: bool) -> Hints:
    instance = exchange.instance if exchange.instance is not None else ext.instance
    if not direct_routing and (instance, ext.prefill_instance, ext.dp_rank) != (None, None, None):
        raise RequestError("direct routing is turned off on this server (frontend.direct_routing)", param="dynamo.instance")
    for pinned in (instance, ext.prefill_instance):
        if pinned is not None and pinned >= 2**64:
            raise RequestError("instance ids are less than 2^64", param="dynamo.instance")
    priority = next((p for p in (exchange.priority, ext.priority, body.priority) if p is not None), 0)
    return Hints(
        priority=priority,
        session=exchange.session or ext.session,
        instance=instance,
        prefill_instance=ext.prefill_instance,
        dp_rank=ext.dp_rank,
        expected_output_tokens=ext.expected_output_tokens,
        ttft_target_ms=ext.ttft_target_ms if ext.ttft_target_ms is not None or ext.router is None else ext.router.ttft_target,
        itl_target_ms=ext.itl_target_ms if ext.itl_target_ms is not None or ext.router is None else ext.router.itl_target,
        required_taints=tuple(ext.required_taints),
        preferred_taints=ext.preferred_taints,
        policy_class=ext.policy_class,
    )
