"""Classes, scores and orders: every form of input, what is refused, and the answers that vectors become."""

from __future__ import annotations

from typing import Any

import pytest
from fake_catalog import FakeModel

from dynamo_core.cards import Pooling
from dynamo_core.types import Delta

COSINE = Pooling(score="cosine")
JOINED = Pooling(labels=("yes",), score="joined")


def classifier(request: Any) -> list[Delta]:
    return [Delta(embedding=[0.1 * len(request.token_ids), 0.5, 0.2], finish_reason="stop")]


def lengths(request: Any) -> list[Delta]:
    return [Delta(embedding=[1.0 / len(request.token_ids)], finish_reason="stop")]


def turned(request: Any) -> list[Delta]:
    return [Delta(embedding=[float(len(request.token_ids)), 1.0], finish_reason="stop")]


def model(say: Any, pooling: Pooling, *surfaces: str) -> FakeModel:
    return FakeModel("m", say, surfaces=surfaces, pooling=pooling)


async def post(site: Any, path: str, **body: Any) -> dict[str, Any]:
    answer = await site.client.post(path, json={"model": "m", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("given", "labels"), [("abcdef", ["a"]), ([5, 6], ["b"]), (["abcdef", "a"], ["a", "b"])])
async def test_each_input_gets_the_class_that_is_most_likely(start, given, labels):
    async with start(model=model(classifier, Pooling(labels=("a", "b")), "classify")) as site:
        body = await post(site, "/v1/classify", input=given, use_activation=False)
        assert (body["object"], [item["label"] for item in body["data"]]) == ("list", labels)
        assert [item["num_classes"] for item in body["data"]] == [3] * len(labels)
        assert [request.activation for request, _, _ in site.model.starts] == [False] * len(labels)
        assert body["id"].startswith("classify-")


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")])
async def test_pairs_come_under_each_of_their_names(start, names):
    async with start(model=model(lengths, JOINED, "classify", "score")) as site:
        body = await post(site, "/v1/score", **{names[0]: "q", names[1]: ["a", "abc"]})
        assert [(item["index"], item["object"], item["score"]) for item in body["data"]] == [(0, "score", 0.5), (1, "score", 0.25)]
        assert [len(request.token_ids) for request, _, _ in site.model.starts] == [2, 4]
        assert body["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


async def test_vectors_are_compared_by_their_angle_and_each_text_is_read_once(start):
    async with start(model=model(turned, COSINE, "embeddings", "score")) as site:
        body = await post(site, "/v1/score", text_1="a", text_2=["b", "bbbb"])
        assert [item["score"] for item in body["data"]] == [pytest.approx(1.0), pytest.approx(5 / (2**0.5 * 17**0.5))]
        assert len(site.model.starts) == 3


@pytest.mark.parametrize(("more", "expected"), [({}, [2, 1, 0]), ({"top_n": 2}, [2, 1]), ({"top_n": 9}, [2, 1, 0]), ({"return_documents": False}, [2, 1, 0])])
async def test_documents_come_the_best_first(start, more, expected):
    documents = ["ccc", "bb", "a"]
    async with start(model=model(lengths, JOINED, "score")) as site:
        body = await post(site, "/v1/rerank", query="q", documents=documents, **more)
        assert [item["index"] for item in body["results"]] == expected
        assert [item.get("document") for item in body["results"]] == [None if "return_documents" in more else {"text": documents[i]} for i in expected]


@pytest.mark.parametrize(("path", "fields", "says"), [
    ("classify", {"input": ""}, "must not be empty"), ("classify", {"input": []}, "must not be empty"), ("classify", {"input": "a", "top_p": 1}, "unknown field"),
    ("score", {"text_1": "a"}, "send `text_1` and `text_2`"), ("score", {"text_1": "a", "documents": "b"}, "send `text_1`"),
    ("score", {"text_1": "a", "text_2": "b", "items": "c"}, "send `text_1`"), ("score", {"text_1": ["a", "b"], "text_2": ["c"]}, "2 texts cannot be paired with 1"),
    ("score", {"text_1": [], "text_2": ["c"]}, "text_1"), ("rerank", {"query": "a", "documents": []}, "documents"),
    ("rerank", {"query": "a", "documents": "b", "top_n": -1}, "top_n"),
])  # fmt: skip
async def test_what_cannot_be_scored_is_refused(start, path, fields, says):
    async with start(model=model(lengths, JOINED, "classify", "score")) as site:
        answer = await site.client.post(f"/v1/{path}", json={"model": "m", **fields})
        assert answer.status_code == 400, answer.text
        assert says in answer.text


async def test_a_model_that_generates_classifies_nothing(start):
    async with start() as site:
        for path, body in (("classify", {"input": "a"}), ("score", {"text_1": "a", "text_2": "b"}), ("rerank", {"query": "a", "documents": "b"})):
            assert "does not answer" in (await site.client.post(f"/v1/{path}", json={"model": "m", **body})).text
