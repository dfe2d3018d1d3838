"""Two real `vllm serve`, as they are, behind our frontend and its KV router: as users run it."""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from dynamo_core.testing.servers import free_port

pytestmark = pytest.mark.slow

PATIENCE = 120.0


@attrs.define(eq=False)
class Fleet:
    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    @property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"never {what}:\n" + "\n".join(self.lines[-40:])
            assert self.process.poll() is None, "dynamo ended:\n" + "\n".join(self.lines[-40:])
            time.sleep(0.1)

    def proven(self) -> int:
        try:
            workers = httpx.get(f"{self.url}/health", timeout=10).json()["models"].get("tiny", {}).get("workers", [])
        except (httpx.HTTPError, KeyError):
            return 0
        return sum(worker["proven"] for worker in workers)

    def complete(self, prompt: list[int], max_tokens: int = 4, **dynamo: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "dynamo": {"annotations": ["token_ids", "worker"], **dynamo}}  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return {**answer.json(), "decision": answer.headers.get("x-dynamo-decision")}

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def dynamo(command: str, stack: Path, port: int) -> Fleet:
    lines: list[str] = []
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", command, str(stack)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()), daemon=True).start()
    return Fleet(f"http://127.0.0.1:{port}", process, lines)


def stack_of(folder: Path, port: int, servers: Any, *, policy: str, more: str = "") -> Path:
    workers = "\n".join(f'[[workers]]\nname = "gpu{server.number}"\nengine = {{ use = "openai", url = "{server.url}" }}\ncanary_interval = 1.0\n{more}\n' for server in servers.all)
    file = folder / "stack.toml"
    file.write_text(f'[discovery]\nuse = "file"\npath = "{folder / "discovery"}"\n\n[frontend]\nport = {port}\n\n[router]\nuse = "{policy}"\n\n{workers}')
    return file


@pytest.fixture(scope="module")
def fleet(vllm_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    port = free_port()
    found = dynamo("up", stack_of(tmp_path_factory.mktemp("fleet"), port, vllm_servers, policy="kv"), port)
    try:
        found.wait(lambda: found.proven() == 2, "ready")
        yield found
    finally:
        found.end()


def ids(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(4, 1000) for _ in range(length)]


def test_the_openai_client_gets_the_same_answer_streamed_and_whole(fleet: Fleet) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}
    whole = fleet.client.chat.completions.create(**asked)
    chunks = list(fleet.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_our_answer_is_that_of_the_server_itself(fleet: Fleet, vllm_servers: Any) -> None:
    prompt = ids(5, 50)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    theirs = httpx.post(f"{vllm_servers[0].url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"][0]
    assert fleet.complete(prompt, 32)["dynamo"]["token_ids"] == [theirs["token_ids"]]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Größe? 😀"}], "max_tokens": 4}
    seen = httpx.post(f"{vllm_servers[0].url}/v1/chat/completions", json={**chat, "return_token_ids": True}, timeout=PATIENCE).json()["prompt_token_ids"]
    ours = httpx.post(f"{fleet.url}/v1/chat/completions", json={**chat, "dynamo": {"annotations": ["prompt_token_ids"]}}, timeout=PATIENCE).json()
    assert ours["dynamo"]["prompt_token_ids"] == [seen], "the template and the tokenizer are the server's"


def test_a_prompt_goes_where_it_went_before_and_vllm_has_what_the_router_predicted(fleet: Fleet) -> None:
    prompts = [ids(seed, 200) for seed in range(8)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:  # together, so that they are spread
        first = [answer["dynamo"]["worker"] for answer in pool.map(lambda prompt: fleet.complete(prompt, 32), prompts)]
    assert len({tuple(workers) for workers in first}) == 2
    for prompt, workers in zip(prompts, first, strict=True):

        def predicted(prompt: list[int] = prompt) -> int:
            record = fleet.complete(prompt, dry_run=True)["record"]
            return int(record["columns"]["kv.overlap_tokens"]["values"][record["workers"].index(record["worker"])])

        fleet.wait(lambda: predicted() == 192, "a prediction")
        again = fleet.complete(prompt)
        assert again["dynamo"]["worker"] == workers
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
        decision = httpx.get(f"{fleet.url}/debug/decisions/{again['decision']}", timeout=10).json()
        assert decision["cached_tokens"] == 192


def test_one_process_stands_before_both_servers_and_knows_their_caches(fleet: Fleet, vllm_servers: Any, tmp_path: Path) -> None:
    """With kv-plus, which also measures how fast servers are: on a busy machine it may leave a small cache unused, and knows of it all the same."""
    port = free_port()
    alone = dynamo("frontend", stack_of(tmp_path, port, vllm_servers, policy="kv-plus", more="inside = true"), port)
    try:
        alone.wait(lambda: alone.proven() == 2, "ready")
        for seed in range(70, 76):
            prompt = ids(seed, 200)
            for server in vllm_servers.all:  # both have it, and nobody else has told the router
                httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1}, timeout=PATIENCE).raise_for_status()

            def known(prompt: list[int] = prompt) -> list[int]:
                return alone.complete(prompt, dry_run=True)["record"]["columns"]["kv.overlap_tokens"]["values"]

            alone.wait(lambda: known() == [192, 192], "known")
            answer = alone.complete(prompt)
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
            assert httpx.get(f"{alone.url}/debug/decisions/{answer['decision']}", timeout=10).json()["cached_tokens"] == 192
    finally:
        alone.end()


def test_requests_move_when_a_server_is_killed_and_it_is_used_again_when_it_is_back(fleet: Fleet, vllm_servers: Any) -> None:
    prompts = [ids(3000 + i, 60) for i in range(12)]

    def answer(prompt: list[int]) -> tuple[list[int], list[str]]:
        report = fleet.complete(prompt, 300)["dynamo"]
        return report["token_ids"][0], report["worker"]

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        expected = [tokens for tokens, _ in pool.map(answer, prompts)]
        time.sleep(0.5)  # until the server has counted them all
        before = _generated(vllm_servers[1])
        answers = [pool.submit(answer, prompt) for prompt in prompts]
        fleet.wait(lambda: _generated(vllm_servers[1]) > before, "busy")
        vllm_servers[1].kill()
        found = [future.result() for future in answers]
    assert [tokens for tokens, _ in found] == expected
    assert any(len(workers) > 1 for _, workers in found), "nobody moved, so nothing was proven"
    fleet.wait(lambda: fleet.proven() == 1, "without it")
    assert fleet.complete(ids(1, 20))["choices"]
    vllm_servers[1].start()
    vllm_servers[1].wait()
    fleet.wait(lambda: fleet.proven() == 2, "whole again")
    known = fleet.complete(prompts[0], dry_run=True)["record"]["columns"]["kv.overlap_tokens"]["values"]
    assert min(known) == 0, f"what the killed server had cached is forgotten: {known}"


def _generated(server: Any) -> float:
    """Tokens so far."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith("vllm:generation_tokens_total{"))
