"""Getting to know a server: wait until it is there, learn what it serves, and prove that it gives tokens for tokens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence

import attrs

from dynamo_core.cards import Artifact, ModelCard
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError, EngineDead, EngineFailed, Problem, RequestError, WorkerOverloaded
from dynamo_core.kv.feed import KvFeed
from dynamo_core.types import Hints, Output, Request, Sampling, Stops
from dynamo_openai.connection import Connections
from dynamo_openai.requests import Requests
from dynamo_openai.server import Cache, Model, Server, Unreachable, cache_of
from dynamo_openai.tokenizer import Texts, found, read

_AGAIN = 1.0
"""Seconds between two knocks at a door that nobody opens."""
_GENERATES = ("logprobs", "prompt_logprobs", "guided", "logit_bias", "n")
_NO_TOKENS = "a recent vLLM has it; for llama.cpp there is the engine `llamacpp`, which runs it itself"

CANARY = "dynamo-canary"


@attrs.frozen
class Options:
    """Of `OpenAIEngine`, which explains them."""

    url: str
    model: str | None
    tokenizer: str | None
    api_key: str | None
    kv_events: str | None
    kv_replay: str | None
    block_size: int | None
    total_blocks: int | None
    dp_size: int | None
    context_length: int | None
    connect_timeout: float


@attrs.frozen
class Met:
    """A server that is known, and proven."""

    server: Server
    connections: Connections
    requests: Requests
    model: Model
    named: bool
    """By the operator; otherwise it was the only one."""
    cache: Cache
    card: ModelCard
    """Of the base model."""
    tokenizer: bytes
    feeds: Sequence[KvFeed]


async def meet(options: Options, context: EngineContext, phase: Callable[[str], None]) -> Met:
    """:raises ConfigError: it is not what it should be."""
    headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
    server = Server(options.url, headers, options.connect_timeout)
    connections = Connections(options.url, headers, options.connect_timeout)
    feeds: list[KvFeed] = []
    try:
        model, aliases = chosen(await _models(server, phase), options.model, options.url)
        phase("read the tokenizer")
        texts = await asyncio.to_thread(lambda: read(found(options.tokenizer, model.root)))
        cache = cache_of(await _metrics(server))
        ranks = options.dp_size or cache.ranks or 1
        sources = await _sources(server, options, ranks, cache)
        card = _card(options, model, aliases, texts, cache, ranks, bool(sources), await server.version())
        phase("ask for a token")
        requests = Requests(connections, options.url, model.id)
        await _prove(requests, card, options.url, phase)
        feeds = [KvFeed(rank, endpoints, context.kv_events) for rank, endpoints in sources.items()]
        for feed in feeds:
            await feed.open()
    except BaseException:
        for feed in feeds:
            await feed.close()
        connections.close()
        await server.close()
        raise
    return Met(server, connections, requests, model, options.model is not None, cache, card, texts.tokenizer, feeds)


async def _models(server: Server, phase: Callable[[str], None]) -> Sequence[Model]:
    while True:
        try:
            return await server.models()
        except Unreachable as e:
            phase(f"wait for {server.url} ({e})")
            await asyncio.sleep(_AGAIN)


async def _metrics(server: Server) -> str:
    try:
        return await server.metrics()
    except Unreachable:
        return ""


def chosen(models: Sequence[Model], name: str | None, url: str) -> tuple[Model, tuple[str, ...]]:
    """The base model to serve, and its other names. :raises ConfigError: there is no such model, or no telling which."""
    bases = [model for model in models if model.parent is None]
    known = ", ".join(model.id for model in bases) or "none"
    if name is not None:
        if (model := next((model for model in bases if model.id == name), None)) is None:
            raise ConfigError(Problem(f"{url} has no model {name!r}", remedy=f"it has: {known}"))
        return model, ()
    if not bases:
        raise ConfigError(Problem(f"{url} serves no model"))
    if len({model.root or model.id for model in bases}) > 1:
        raise ConfigError(Problem(f"{url} serves several models", remedy=f"say which one by `model`: {known}"))
    return bases[0], tuple(model.id for model in bases[1:])  # one model under several names


async def _sources(server: Server, options: Options, ranks: int, cache: Cache) -> Mapping[int, tuple[str, str | None]]:
    """Where each rank publishes its KV events."""
    if options.kv_events == "off" or not cache.prefixes:
        return {}
    if options.kv_events is None:
        told = await server.kv_sources()
        return {rank: told[rank] for rank in range(ranks) if rank in told}
    replay = options.kv_replay
    return {rank: (of_rank(options.kv_events, rank), None if replay is None else of_rank(replay, rank)) for rank in range(ranks)}


def of_rank(endpoint: str, rank: int) -> str:
    """vLLM publishes rank r on port + r."""
    if "{rank}" in endpoint:
        return endpoint.replace("{rank}", str(rank))
    return re.sub(r":(\d+)$", lambda port: f":{int(port[1]) + rank}", endpoint)


def _card(options: Options, model: Model, aliases: tuple[str, ...], texts: Texts, cache: Cache, ranks: int, events: bool, version: str) -> ModelCard:
    length = options.context_length or model.max_model_len
    if length is None:
        raise ConfigError(Problem(f"{options.url} does not say how many tokens a request may have", remedy="set context_length"))
    block_size = options.block_size or cache.block_size
    if events and block_size is None:
        raise ConfigError(Problem(f"{options.url} does not say how many tokens a block of its KV cache has, and its KV events cannot be read without",
                                  remedy='set block_size to the server\'s (--block-size; 16 by default on GPUs), or kv_events = "off"'))  # fmt: skip
    return ModelCard(
        name=model.id,
        aliases=aliases,
        surfaces=("chat", "completions") if texts.chat_template else ("completions",),
        context_length=length,
        vocab_size=texts.vocab_size,
        eos_token_ids=texts.eos_token_ids,
        tokenizer=Artifact.of("tokenizer.json", texts.tokenizer),
        chat_template=texts.chat_template,
        template_tokens=texts.template_tokens,
        add_bos=texts.add_bos,
        default_max_tokens=texts.default_max_tokens,
        block_size=block_size or 16,
        total_blocks=options.total_blocks or cache.total_blocks,
        dp_size=ranks,
        kv_events=events,
        capabilities=_GENERATES,
        engine=f"vLLM {version} at {options.url}" if version else f"{model.owned_by or 'server'} at {options.url}",
        runtime={"url": options.url},
    )


# ------------------------------------------------------------------ the proof


def one_token(rank: int | None = None, priority: int = 0) -> Request:
    hints = Hints(dp_rank=rank, priority=priority)
    stops = Stops(max_tokens=1, ignore_eos=True)
    return Request(id=CANARY, model="", token_ids=[0], cache_salt=CANARY, sampling=Sampling(temperature=0.0), stops=stops, hints=hints)


async def _prove(requests: Requests, card: ModelCard, url: str, phase: Callable[[str], None]) -> None:
    """One token, with a priority if the server has such. :raises ConfigError: none came, or its id did not."""
    try:
        try:
            outputs = await _asked(requests, card, one_token(priority=1), phase)
        except RequestError:  # vLLM refuses priorities where its scheduler knows none
            requests.priorities = False
            outputs = await _asked(requests, card, one_token(), phase)
    except (RequestError, EngineFailed) as e:
        raise ConfigError(Problem(f"{url} does not generate from tokens: {e}", remedy=f"`return_token_ids` of /v1/completions is needed: {_NO_TOKENS}")) from e
    except EngineDead as e:
        raise ConfigError(Problem(f"{url} lists its models and does not generate: {e}")) from e
    if not any(output.token_ids for output in outputs):
        raise ConfigError(Problem(f"{url} answers with text and not with token ids", remedy=f"`return_token_ids` of /v1/completions is needed: {_NO_TOKENS}"))


async def _asked(requests: Requests, card: ModelCard, request: Request, phase: Callable[[str], None]) -> list[Output]:
    """What comes as soon as the server has room. :raises DynamoError: it was refused."""
    while True:
        try:
            return [output async for output in requests.generate(request, card, 1)]
        except WorkerOverloaded as e:
            phase(f"wait for {requests.url} ({e})")
            await asyncio.sleep(_AGAIN)


