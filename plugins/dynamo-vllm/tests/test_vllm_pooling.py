"""Classifiers and models that score: what `/v1/classify`, `/v1/score` and `/v1/rerank` say is what vLLM's own `LLM` says."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Use
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.testing.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ARGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20, "dtype": "float32", "runner": "pooling"}
QUERY = "What is the capital of France?"
TEXTS = ["The capital of France is Paris.", "Two and two make four.", "for i in range(10):", "Größe, façade, naïve"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_model: Any) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pooling")
    return {
        "classes": tiny_model.make_classifier(folder / "classes"),
        "reranker": tiny_model.make_classifier(folder / "reranker", ("relevant",)),
        "crossing": tiny_model.make_cross_encoder(folder / "crossing"),
        "tiny": tiny,
    }


@pytest.fixture(scope="module")
def own(models: dict[str, Path], client: httpx.AsyncClient) -> dict[str, Any]:
    """What vLLM's own `LLM` says, in this process, after every fork of it."""
    from vllm import LLM, PoolingParams

    def llm(name: str) -> Any:
        return LLM(str(models[name]), enforce_eager=True, disable_log_stats=True, **ARGS)

    classes = llm("classes")
    said = {"classes": [one.outputs.probs for one in classes.classify(TEXTS, use_tqdm=False)],
            "logits": [one.outputs.probs for one in classes.classify(TEXTS, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)]}  # fmt: skip
    del classes
    for name in ("reranker", "crossing", "tiny"):
        said[name] = [one.outputs.score for one in llm(name).score(QUERY, TEXTS, use_tqdm=False)]
    return said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(models: dict[str, Path]) -> AsyncIterator[httpx.AsyncClient]:
    def use(name: str) -> Use:
        return Use("vllm", {"model": str(models[name]), "args": ARGS, "start_method": "fork"})

    async with Cluster.up(workers=0, engine=use("classes")) as cluster:
        for number, name in enumerate(models):
            await cluster.add(engine=use(name), name=name)
            await cluster.wait_ready(number + 1, timeout=120)
        app = create_app(cluster.config.frontend, cluster.catalog, metrics=HttpMetrics(CollectorRegistry()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120) as client:
            yield client


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_classes_are_those_of_vllms_own_classify(client: httpx.AsyncClient, own: dict[str, Any]) -> None:
    said = await post(client, "/v1/classify", model="classes", input=TEXTS)
    assert [item["probs"] for item in said["data"]] == [pytest.approx(probs, abs=1e-4) for probs in own["classes"]]
    for item in said["data"]:
        assert math.fsum(item["probs"]) == pytest.approx(1.0, abs=1e-4)
        assert item["label"] == ("good", "bad", "neither")[item["probs"].index(max(item["probs"]))]
        assert item["num_classes"] == 3
    logits = await post(client, "/v1/classify", model="classes", input=TEXTS, use_activation=False)
    assert [item["probs"] for item in logits["data"]] == [pytest.approx(values, abs=1e-3) for values in own["logits"]]


@pytest.mark.parametrize("model", ["reranker", "crossing", "tiny"])
async def test_scores_are_those_of_vllms_own_score_and_rerank_sorts_by_them(client: httpx.AsyncClient, own: dict[str, Any], model: str) -> None:
    said = await post(client, "/v1/score", model=model, text_1=QUERY, text_2=TEXTS)
    assert [item["score"] for item in said["data"]] == pytest.approx(own[model], abs=1e-4)
    assert len({round(score, 5) for score in own[model]}) == len(TEXTS)
    ranked = await post(client, "/v1/rerank", model=model, query=QUERY, documents=TEXTS, top_n=3)
    best = sorted(range(len(TEXTS)), key=lambda i: -own[model][i])[:3]
    assert [(item["index"], item["document"]["text"]) for item in ranked["results"]] == [(i, TEXTS[i]) for i in best]
    assert ranked["usage"]["prompt_tokens"] == said["usage"]["prompt_tokens"] > 0


async def test_many_pairs_are_scored_as_they_stand(client: httpx.AsyncClient, own: dict[str, Any]) -> None:
    said = await post(client, "/v1/score", model="crossing", queries=[QUERY] * len(TEXTS), documents=TEXTS)
    assert [item["score"] for item in said["data"]] == pytest.approx(own["crossing"], abs=1e-4)


async def test_who_has_no_scores_says_what_it_has(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/score", json={"model": "classes", "text_1": "a", "text_2": "b"})
    assert answer.status_code == 400
    assert "does not answer score; it offers classify" in answer.text


async def test_the_openai_client_gets_vectors_and_posts_to_the_other_paths(client: httpx.AsyncClient, own: dict[str, Any]) -> None:
    import openai

    ai = openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", http_client=client)
    vectors = await ai.embeddings.create(model="tiny", input=TEXTS)
    assert len(vectors.data) == len(TEXTS)
    said: Any = await ai.post("/rerank", body={"model": "tiny", "query": QUERY, "documents": TEXTS}, cast_to=object)
    assert [item["relevance_score"] for item in said["results"]] == pytest.approx(sorted(own["tiny"], reverse=True), abs=1e-4)
