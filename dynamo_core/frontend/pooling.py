"""`POST /v1/classify`, `/v1/score` and `/v1/rerank`: texts to a job for a model that answers with vectors, and its vectors to an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from dynamo_core.errors import EngineFailed, RequestError
from dynamo_core.frontend.answers import Answer
from dynamo_core.frontend.chunks import Chunks, encode
from dynamo_core.frontend.completions import split
from dynamo_core.frontend.convert import extension, hints
from dynamo_core.frontend.embeddings import MAX_INPUTS
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import ClassifyBody, PoolingBody, RerankBody, ScoreBody
from dynamo_core.frontend.job import Job
from dynamo_core.pipeline.contract import Model
from dynamo_core.preprocess.contract import EncodesPairs
from dynamo_core.preprocess.limits import check_token_ids, fit
from dynamo_core.types import Delta, LogprobText, Request, Stops, TextOptions, Usage

Prompt = tuple[list[int], int | None]
"""Token ids, and where the second of two texts begins."""


class Classify:
    """The API family of classes."""

    name = "classify"
    surface = "classify"
    decoder = msgspec.json.Decoder(ClassifyBody)

    async def prepare(self, body: ClassifyBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        prompts = [(item if not isinstance(item, str) else await _encode(model, item), None) for item in split(body.input, "input", MAX_INPUTS)]
        labels = model.card.pooling.labels if model.card.pooling else ()
        return _job("classify", body, model, exchange, prompts, partial(ClassifyAnswer, labels), direct_routing=direct_routing)


class Score:
    """The API family of scores."""

    name = "score"
    surface = "score"
    decoder = msgspec.json.Decoder(ScoreBody)

    async def prepare(self, body: ScoreBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        first, second = _two(body)
        if len(first) not in (1, len(second)):
            raise RequestError(f"{len(first)} texts cannot be paired with {len(second)}: send one, or as many", param="text_1")
        prompts, pairs = await _prompts(model, first, second)
        return _job("score", body, model, exchange, prompts, partial(ScoreAnswer, pairs), direct_routing=direct_routing)


class Rerank:
    """The API family of orders."""

    name = "rerank"
    surface = "score"
    decoder = msgspec.json.Decoder(RerankBody)

    async def prepare(self, body: RerankBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        documents = [body.documents] if isinstance(body.documents, str) else body.documents
        prompts, pairs = await _prompts(model, [body.query], documents)
        shown = None if body.return_documents is False else documents
        return _job("rerank", body, model, exchange, prompts, partial(RerankAnswer, pairs, shown, body.top_n), direct_routing=direct_routing)


# ------------------------------------------------------------------ texts to prompts

Pairs = Sequence[tuple[int, int]]
"""For each score, the two vectors whose angle it is; a vector with itself is the score."""


def _two(body: ScoreBody) -> tuple[list[str], list[str]]:
    found = [
        (getattr(body, one), getattr(body, two))
        for one, two in (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
        if getattr(body, one) is not None and getattr(body, two) is not None
    ]
    given = sum(getattr(body, name) is not None for name in ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"))
    if len(found) != 1 or given != 2:
        raise RequestError("send `text_1` and `text_2`, or `queries` and `documents`, or `queries` and `items`, or `data_1` and `data_2`", param="text_1")
    first, second = found[0]
    return [first] if isinstance(first, str) else first, [second] if isinstance(second, str) else second


async def _encode(model: Model, text: str) -> list[int]:
    return await model.preprocessor.encode(text, add_special_tokens=model.card.add_bos)


async def _prompts(model: Model, first: list[str], second: list[str]) -> tuple[list[Prompt], Pairs]:
    """What to ask the engine, and which of its vectors make up each score."""
    way = model.card.pooling.score if model.card.pooling else None
    if way == "cosine":
        offset = len(first)
        pairs = [(0 if len(first) == 1 else i, offset + i) for i in range(len(second))]
        return [(await _encode(model, text), None) for text in (*first, *second)], pairs
    prompts: list[Prompt] = []
    for one, two in zip(first * len(second) if len(first) == 1 else first, second, strict=True):
        if way == "joined":
            prompts.append((await _encode(model, one + two), None))
        elif isinstance(model.preprocessor, EncodesPairs):
            token_ids, start = await model.preprocessor.encode_pair(one, two)
            prompts.append((token_ids, start if model.card.pooling and model.card.pooling.segments else None))
        else:
            raise RequestError(f"this server has no tokenizer for pairs of texts of model {model.name!r}", param="model")
    return prompts, [(i, i) for i in range(len(prompts))]


def _job(prefix: str, body: PoolingBody, model: Model, exchange: Exchange, prompts: Sequence[Prompt], answer: Callable[[int, Sequence[str]], Answer],
         *, direct_routing: bool) -> Job:  # fmt: skip
    ext, card = extension(body), model.card
    wanted = hints(body, ext, exchange, direct_routing=direct_routing)
    requests: list[Request] = []
    for position, (token_ids, second) in enumerate(prompts):
        if not token_ids:
            raise RequestError("a text must not be empty", param="input")
        check_token_ids(card, token_ids)
        fit(card, len(token_ids), 1)
        requests.append(
            Request(
                id=exchange.unique_id if len(prompts) == 1 else f"{exchange.unique_id}-{position}",
                model=card.name, token_ids=token_ids, stops=Stops(max_tokens=1), hints=wanted, adapter=card.adapter,
                cache_salt=ext.cache_salt if ext.cache_salt is not None else body.cache_salt, activation=body.use_activation, second_text=second,
            )
        )  # fmt: skip
    return Job(
        id=f"{prefix}-{exchange.unique_id}", body=body, model=model, requests=requests, text=TextOptions(), prompts=(), echo=False,
        annotations=ext.annotations, dry_run=ext.dry_run, chunks=Chunks, answer=answer,
    )  # fmt: skip


# ------------------------------------------------------------------ vectors to answers


class _VectorAnswer(Answer):
    """Collects one vector for each prompt."""

    object = "list"

    def __init__(self, choices: int, echo: Sequence[str]) -> None:
        super().__init__(choices)
        self._vectors: list[list[float] | None] = [None] * choices

    def add(self, deltas: Sequence[Delta]) -> None:
        super().add(deltas)
        for delta in deltas:
            if delta.embedding is not None:
                self._vectors[delta.index] = delta.embedding

    def encode(
        self, id: str, created: int, model: str, usage: Usage, prompt_logprobs: Sequence[LogprobText | None] | None, report: dict[str, Any] | None
    ) -> bytes:
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        top = {"id": id, "object": self.object, "created": created, "model": model, **self._data(), "usage": counts}
        return encode(top | ({} if report is None else {"dynamo": report}))

    def _data(self) -> dict[str, Any]:
        raise NotImplementedError

    def _vector(self, index: int) -> list[float]:
        """:raises EngineFailed: it never came."""
        if not (vector := self._vectors[index]):
            raise EngineFailed("the engine ended without a vector")
        return vector


class ClassifyAnswer(_VectorAnswer):
    def __init__(self, labels: Sequence[str], choices: int, echo: Sequence[str]) -> None:
        super().__init__(choices, echo)
        self._labels = labels

    def _data(self) -> dict[str, Any]:
        return {"data": [self._class(index, self._vector(index)) for index in range(len(self._vectors))]}

    def _class(self, index: int, probs: list[float]) -> dict[str, Any]:
        best = max(range(len(probs)), key=probs.__getitem__)
        return {"index": index, "label": self._labels[best] if best < len(self._labels) else None, "probs": probs, "num_classes": len(probs)}


class ScoreAnswer(_VectorAnswer):
    def __init__(self, pairs: Pairs, choices: int, echo: Sequence[str]) -> None:
        super().__init__(choices, echo)
        self._pairs = pairs

    def _scores(self) -> list[float]:
        return [self._vector(one)[0] if one == two else _cosine(self._vector(one), self._vector(two)) for one, two in self._pairs]

    def _data(self) -> dict[str, Any]:
        return {"data": [{"index": index, "object": "score", "score": score} for index, score in enumerate(self._scores())]}


class RerankAnswer(ScoreAnswer):
    def __init__(self, pairs: Pairs, documents: Sequence[str] | None, top: int, choices: int, echo: Sequence[str]) -> None:
        super().__init__(pairs, choices, echo)
        self._documents = documents
        self._top = top

    def _data(self) -> dict[str, Any]:
        scores = self._scores()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self._top or None]
        return {"results": [{"index": index, "relevance_score": scores[index], **self._document(index)} for index in order]}

    def _document(self, index: int) -> dict[str, Any]:
        return {} if self._documents is None else {"document": {"text": self._documents[index]}}


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    length = math.hypot(*one) * math.hypot(*other)
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / length if length else 0.0
