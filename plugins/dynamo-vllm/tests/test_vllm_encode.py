"""Images read by an encode worker, which is a vLLM without a KV cache: who reads the prompt takes what it made of them, and says what one worker says."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from base64 import b64decode
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from dynamo_core.config.schema import Use
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError
from dynamo_core.frontend.app import create_app
from dynamo_core.frontend.metrics import HttpMetrics
from dynamo_core.testing.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
CASES = [(RED,), (BLUE,), (RED, BLUE), ()]


def front(cluster: Cluster) -> httpx.AsyncClient:
    app = create_app(cluster.config.frontend, cluster.catalog, metrics=HttpMetrics(CollectorRegistry()))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=120)


async def say(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[int], list[str]]:
    body["dynamo"]["annotations"] = ["token_ids", "worker"]
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    said = answer.json()["dynamo"]
    return said["token_ids"][0], [worker.rpartition("-")[0] for worker in said["worker"]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture(scope="module")
def use(seeing: Path, seeing_args: dict[str, Any], shared: Path) -> Any:
    encoders = {"ec_connector": "ECExampleConnector", "ec_connector_extra_config": {"shared_storage_path": str(shared)}}

    def use(role: str, **options: Any) -> Use:
        return Use("vllm", {"model": str(seeing), "args": seeing_args, "start_method": "fork", "role": role, "encoders": encoders, **options})

    return use


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(use: Any, image_body: Any) -> list[list[int]]:
    async with Cluster.up(workers=1, engine=use("aggregated", encoders={})) as cluster, front(cluster) as client:
        return [(await say(client, image_body(*colors)))[0] for colors in CASES]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(use: Any) -> AsyncIterator[Cluster]:
    async with Cluster.up(workers=0, engine=use("aggregated")) as cluster:
        await cluster.add(engine=use("encode"), name="encode")
        await cluster.add(name="reader")
        await cluster.wait_ready(2)
        yield cluster


def file(shared: Path, body: dict[str, Any]) -> Path:
    """Where an image is after it was encoded."""
    (part,) = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    data = b64decode(part["image_url"]["url"].partition(",")[2])
    return shared / f"media:{hashlib.sha256(data).hexdigest()}" / "encoder_cache.safetensors"


def files(shared: Path) -> set[str]:
    return {path.name for path in shared.rglob("*") if path.is_file()}


async def test_what_an_encode_worker_and_a_reader_say_is_what_one_worker_says(cluster: Cluster, expected: list[list[int]], image_body: Any, shared: Path) -> None:
    async with front(cluster) as client:
        for colors, tokens in zip(CASES, expected, strict=True):
            said, workers = await say(client, image_body(*colors))
            assert said == tokens
            assert workers == (["encode", "reader"] if colors else ["reader"])
    assert file(shared, image_body(RED)).exists()
    assert len({tuple(tokens) for tokens in expected}) == len(CASES)


async def test_what_was_encoded_is_there_whole_or_not_at_all(cluster: Cluster, shared: Path, image_body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    import torch

    from dynamo_vllm.shared_folder import SharedFolder

    def half(tensors: dict[str, Any], path: Path) -> None:
        path.write_bytes(safetensors.torch.save(tensors)[:-1])
        raise OSError("No space left on device")

    assert files(shared) == {"encoder_cache.safetensors"}
    folder: Any = object.__new__(SharedFolder)
    folder._storage_path, folder._is_producer = str(shared), True
    green = file(shared, image_body((1, 255, 1)))
    with monkeypatch.context() as m, pytest.raises(OSError, match="No space"):
        m.setattr(safetensors.torch, "save_file", half)
        folder.save_caches({green.parent.name: torch.ones(4)}, green.parent.name)
    assert list(green.parent.iterdir()) == []
    folder.save_caches({green.parent.name: torch.ones(4)}, green.parent.name)
    assert safetensors.torch.load_file(green)["ec_cache"].tolist() == [1.0] * 4
    connector = cluster.worker(0).engine._running._engine.vllm_config.ec_transfer_config.ec_connector  # pyright: ignore
    assert connector == "SharedFolder"


async def test_an_encode_worker_answers_its_probe(cluster: Cluster) -> None:
    await cluster.worker(0).probe()


async def test_who_reads_the_prompt_takes_what_was_encoded_and_encodes_what_was_not(cluster: Cluster, expected: list[list[int]], image_body: Any, shared: Path) -> None:
    await cluster.drain(0)
    white = file(shared, image_body(WHITE))
    white.parent.mkdir()
    shutil.copy(file(shared, image_body(BLUE)), white)
    async with front(cluster) as client:
        assert await say(client, image_body(WHITE)) == (expected[1], ["reader"]), "white is what somebody has made of it"
        said, _ = await say(client, image_body((0, 255, 0)))
        assert said not in expected
        assert not file(shared, image_body((0, 255, 0))).exists()


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: pip install --no-deps nixl nixl-cu12")
async def test_three_workers_say_what_one_says(use: Any, expected: list[list[int]], image_body: Any) -> None:
    async with Cluster.up(workers=0, engine=use("aggregated")) as cluster:
        for role in ("encode", "prefill", "decode"):
            await cluster.add(engine=use(role), name=role)
        await cluster.wait_ready(3)
        async with front(cluster) as client:
            for colors, tokens in zip(CASES, expected, strict=True):
                assert await say(client, image_body(*colors)) == (tokens, ["encode", "prefill", "decode"][not colors :])


async def test_an_encode_worker_must_know_how_its_work_travels(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="how what it makes of images reaches"):
        await make_engine(role="encode").start(EngineContext())
