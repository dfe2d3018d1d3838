"""Embeddings: inputs in all their forms, vectors in both encodings."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from fake_catalog import FakeModel

from dynamo_core.types import Delta


def vectors(request: Any) -> list[Delta]:
    return [Delta(embedding=[float(len(request.token_ids)), -0.5], finish_reason="stop")]


def model(**card: Any) -> FakeModel:
    return FakeModel("m", vectors, surfaces=("embeddings",), add_bos=True, **card)


@pytest.mark.parametrize(
    ("given", "tokens"), [("ab", [[1, 353, 354]]), ([5, 6], [[5, 6]]), ([[5], [6, 7]], [[5], [6, 7]]), (["a", "b"], [[1, 353], [1, 354]])]
)
async def test_each_input_gets_a_vector_in_its_place(start, given, tokens):
    async with start(model=model()) as site:
        body = (await site.client.post("/v1/embeddings", json={"model": "m", "input": given})).json()
        assert body["object"] == "list"
        assert [(item["index"], item["embedding"]) for item in body["data"]] == [(i, [float(len(ids)), -0.5]) for i, ids in enumerate(tokens)]
        assert [request.token_ids for request, _, _ in site.model.starts] == tokens
        assert body["usage"] == {"prompt_tokens": sum(map(len, tokens)), "total_tokens": sum(map(len, tokens))}


async def test_base64_holds_the_same_vector(start):
    async with start(model=model()) as site:
        body = (await site.client.post("/v1/embeddings", json={"model": "m", "input": "ab", "encoding_format": "base64"})).json()
        assert struct.unpack("<2f", base64.b64decode(body["data"][0]["embedding"])) == (3.0, -0.5)


@pytest.mark.parametrize(
    "fields",
    [{"input": ""}, {"input": []}, {"input": ["a", 5]}, {"input": "a", "dimensions": 5},
     {"input": [2000]}, {"input": [5] * 1000}, {"input": "a", "temperature": 1}],
    ids=["no-text", "no-inputs", "mixture", "dimensions", "vocabulary", "too-long", "temperature"],
)  # fmt: skip
async def test_what_makes_no_vector_is_refused(start, fields):
    async with start(model=FakeModel("m", vectors, surfaces=("embeddings",))) as site:
        response = await site.client.post("/v1/embeddings", json={"model": "m", **fields})
        assert response.status_code == 400, response.text


async def test_a_model_that_generates_has_no_vectors_and_the_other_way_round(start):
    async with start(model=model()) as site:
        assert "does not answer completions" in (await site.complete(prompt="a")).text
    async with start() as site:
        assert "does not answer embeddings" in (await site.client.post("/v1/embeddings", json={"model": "m", "input": "a"})).text
