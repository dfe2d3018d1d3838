"""`POST /v1/completions`: one or several plain prompts to a job."""

from __future__ import annotations

from typing import cast

import msgspec

from dynamo_core.errors import RequestError
from dynamo_core.frontend.answers import CompletionAnswer
from dynamo_core.frontend.chunks import CompletionChunks
from dynamo_core.frontend.convert import convert, extension
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import CompletionBody
from dynamo_core.frontend.job import Job
from dynamo_core.pipeline.contract import Model
from dynamo_core.types import Request

MAX_PROMPTS = 128
MAX_CHOICES = 256
"""Prompts times `n`, of one request."""


class Completions:
    """The API family of plain completions."""

    name = "completions"
    surface = "completions"
    decoder = msgspec.json.Decoder(CompletionBody)

    async def prepare(self, body: CompletionBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        ext = extension(body)
        n = body.n or 1
        if body.suffix:
            raise RequestError("suffix is not supported: the engines behind this server do not fill in the middle", param="suffix")
        if body.best_of is not None and body.best_of != n:
            raise RequestError(f"best_of must equal n, which is {n}", param="best_of")
        if body.max_tokens == 0:
            raise RequestError("max_tokens must be at least 1", param="max_tokens")
        prompts = split(body.prompt, "prompt", MAX_PROMPTS) if ext.token_ids is None else [ext.token_ids]
        if len(prompts) * n > MAX_CHOICES:
            raise RequestError(f"{len(prompts)} prompts times n = {n} are more than {MAX_CHOICES} choices", param="prompt")
        if len(prompts) > 1 and (body.prompt_logprobs is not None or (body.echo and body.logprobs is not None)):
            raise RequestError("logprobs of the prompt are only given for one prompt at a time", param="prompt")
        prompt_logprobs = body.logprobs if body.echo and body.logprobs is not None and body.prompt_logprobs is None else body.prompt_logprobs
        wanted = convert(
            body, model.card, exchange, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs, direct_routing=direct_routing
        )
        texts: list[str] = []
        requests: list[Request] = []
        for position, prompt in enumerate(prompts):
            unique = exchange.unique_id if len(prompts) == 1 else f"{exchange.unique_id}-{position}"
            if isinstance(prompt, str):
                requests.append(wanted.request(unique, model.card, await model.preprocessor.encode(prompt, add_special_tokens=model.card.add_bos)))
                texts.append(prompt if body.echo or "formatted_prompt" in ext.annotations else "")
            else:
                requests.append(wanted.request(unique, model.card, prompt))
                texts.append(model.preprocessor.decode(prompt, skip_special_tokens=wanted.text.skip_special_tokens) if body.echo else "")
        body.prompt = ""  # a stream may last minutes, and a thousand long prompts are a lot of memory
        return Job(
            id=f"cmpl-{exchange.unique_id}",
            body=body,
            model=model,
            requests=requests,
            text=wanted.text,
            prompts=texts,
            echo=bool(body.echo),
            annotations=ext.annotations,
            dry_run=ext.dry_run,
            chunks=CompletionChunks,
            answer=CompletionAnswer,
        )


def split(prompt: str | list[str | int | list[int]], name: str, limit: int) -> list[str | list[int]]:
    """A string or a list of token ids is one prompt; a list of either is several. `name` is what the client calls it."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError(f"{name} must not be empty", param=name)
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(kinds) > 1:
        raise RequestError(f"{name}: use strings, or token ids, or lists of token ids; not a mixture", param=name)
    if len(prompt) > limit:
        raise RequestError(f"{name}: {len(prompt)} of them are more than {limit}", param=name)
    return cast("list[str | list[int]]", prompt)
