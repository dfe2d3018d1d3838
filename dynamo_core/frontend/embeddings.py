"""`POST /v1/embeddings`: one or several inputs to a job, and its vectors to an answer."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from dynamo_core.errors import EngineFailed, RequestError
from dynamo_core.frontend.answers import Answer
from dynamo_core.frontend.chunks import Chunks, encode
from dynamo_core.frontend.completions import split
from dynamo_core.frontend.convert import extension, hints
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import EmbeddingBody
from dynamo_core.frontend.job import Job
from dynamo_core.pipeline.contract import Model
from dynamo_core.preprocess.limits import check_token_ids, fit
from dynamo_core.types import Delta, LogprobText, Request, Stops, TextOptions, Usage

MAX_INPUTS = 2048


class Embeddings:
    """The API family of vectors."""

    name = "embeddings"
    surface = "embeddings"
    decoder = msgspec.json.Decoder(EmbeddingBody)

    async def prepare(self, body: EmbeddingBody, model: Model, exchange: Exchange, *, direct_routing: bool) -> Job:
        """:raises RequestError: the request cannot be served by this model."""
        ext = extension(body)
        if body.dimensions is not None:
            raise RequestError("dimensions is not supported: vectors have the length that the model gives them", param="dimensions")
        inputs = split(body.input, "input", MAX_INPUTS) if ext.token_ids is None else [ext.token_ids]
        wanted = hints(body, ext, exchange, direct_routing=direct_routing)
        card = model.card
        requests: list[Request] = []
        for position, item in enumerate(inputs):
            token_ids = await model.preprocessor.encode(item, add_special_tokens=card.add_bos) if isinstance(item, str) else item
            if not token_ids:
                raise RequestError("input must not be empty", param="input")
            check_token_ids(card, token_ids)
            fit(card, len(token_ids), 1)
            requests.append(
                Request(
                    id=exchange.unique_id if len(inputs) == 1 else f"{exchange.unique_id}-{position}",
                    model=card.name,
                    token_ids=token_ids,
                    stops=Stops(max_tokens=1),
                    hints=wanted,
                    adapter=card.adapter,
                    cache_salt=ext.cache_salt if ext.cache_salt is not None else body.cache_salt,
                )
            )
        return Job(
            id=f"embd-{exchange.unique_id}",
            body=body,
            model=model,
            requests=requests,
            text=TextOptions(),
            prompts=(),
            echo=False,
            annotations=ext.annotations,
            dry_run=ext.dry_run,
            chunks=Chunks,
            answer=Base64Answer if body.encoding_format == "base64" else FloatAnswer,
        )


class FloatAnswer(Answer):
    """Collects one vector for each input."""

    object = "list"

    def __init__(self, choices: int, echo: Sequence[str] = ()) -> None:
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
        data: list[dict[str, Any]] = []
        for index, vector in enumerate(self._vectors):
            if vector is None:
                raise EngineFailed("the engine ended without a vector")
            data.append({"object": "embedding", "index": index, "embedding": self._vector(vector)})
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        return encode({"object": self.object, "data": data, "model": model, "usage": counts} | ({} if report is None else {"dynamo": report}))

    def _vector(self, vector: list[float]) -> Any:
        return vector


class Base64Answer(FloatAnswer):
    def _vector(self, vector: list[float]) -> Any:
        """Little-endian float32, which every machine that we run on has."""
        return base64.b64encode(array("f", vector).tobytes()).decode()
