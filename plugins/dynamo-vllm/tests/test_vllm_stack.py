"""The whole stack as users run it: `dynamo up` with two vLLM workers behind the KV router, the OpenAI client in front."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
import socket
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

pytestmark = pytest.mark.slow

PATIENCE = 240.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@attrs.define
class Stack:
    """A running `dynamo up`."""

    file: Path
    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    @property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def fleet(self) -> list[dict[str, Any]]:
        """Workers of the base model."""
        models = httpx.get(f"{self.url}/health", timeout=30).json()["models"]
        return models.get("tiny", {}).get("workers", [])

    def cores(self) -> list[Any]:
        """The engine cores of vLLM, one for each worker."""
        import psutil

        found: list[Any] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # ended, or a zombie
                if "EngineCore" in " ".join([process.name(), *process.cmdline()]):
                    found.append(process)
        return found

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"never {what}:\n" + "\n".join(self.lines[-40:])
            assert self.process.poll() is None, "dynamo up ended:\n" + "\n".join(self.lines[-40:])
            time.sleep(0.1)


def run(command: list[str], **options: Any) -> tuple[subprocess.Popen[str], list[str]]:
    lines: list[str] = []
    process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()), daemon=True).start()
    return process, lines


@pytest.fixture(scope="module")
def stack(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder, port = tmp_path_factory.mktemp("stack"), free_port()
    file = folder / "stack.toml"
    file.write_text(f"""
[discovery]
use = "file"
path = "{folder / "discovery"}"

[frontend]
port = {port}

[router]
use = "kv"

[[workers]]
count = 2
canary_timeout = 60.0

[workers.engine]
use = "vllm"
model = "{tiny}"
args = {{ max_model_len = 1024, max_num_seqs = 16, kv_cache_memory_bytes = 33554432, block_size = 32, dtype = "float32", enable_lora = true }}
""")
    process, lines = run(["up", str(file)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = Stack(file, f"http://127.0.0.1:{port}", process, lines)
    try:
        found.wait(lambda: any(line.startswith("ready:") for line in lines), "ready")
        yield found
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def ids(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(4, 1000) for _ in range(length)]


def complete(url: str, prompt: list[int], max_tokens: int = 4, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    answer.raise_for_status()
    return answer


def cached(answer: httpx.Response) -> int:
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_openai_client_gets_the_same_answer_streamed_and_whole(stack: Stack) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24, "temperature": 0}
    whole = stack.client.chat.completions.create(**asked)
    chunks = list(stack.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.model == "tiny"


def test_the_openai_client_gets_logprobs_and_guided_output(stack: Stack) -> None:
    answer = stack.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "yes or no?"}], max_tokens=8, logprobs=True, top_logprobs=2, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert answer.choices[0].message.content in ("yes", "no")
    assert all(len(position.top_logprobs) == 2 for position in answer.choices[0].logprobs.content)


def test_the_routers_prediction_is_what_vllm_then_finds_in_its_cache(stack: Stack) -> None:
    for seed in range(6):
        prompt = ids(seed, 200)
        complete(stack.url, prompt)

        def predicted(prompt: list[int] = prompt) -> int:
            decision = complete(stack.url, prompt, dynamo={"dry_run": True}).json()["record"]
            chosen = decision["workers"].index(decision["worker"])
            return int(decision["columns"]["kv.overlap_tokens"]["values"][chosen])

        stack.wait(lambda: predicted() == 192, "a prediction")
        assert cached(complete(stack.url, prompt)) == 192


def test_kv_routing_finds_more_in_the_caches_than_round_robin_does(stack: Stack) -> None:
    port = free_port()
    frontend, lines = run(["frontend", str(stack.file), f"--set=frontend.port={port}", "--set=router.use=round-robin"])
    try:
        other = f"http://127.0.0.1:{port}"
        stack.wait(lambda: _ready(other), f"ready: {lines[-5:]}")

        def hits(url: str, salt: int) -> int:
            order = [group for group in range(8) for _ in range(4)]
            random.Random(5).shuffle(order)
            total = 0
            for turn, group in enumerate(order):
                total += cached(complete(url, ids(salt + group, 160) + ids(turn, 20), 1))
                time.sleep(0.05)  # the events of one request should be there before the next is routed
            return total

        round_robin, kv = hits(other, 1000), hits(stack.url, 2000)
        assert kv == 8 * 3 * 160, "after its first time, each group finds its whole prefix"
        assert kv > round_robin
    finally:
        frontend.terminate()
        frontend.wait(30)


def _ready(url: str) -> bool:
    try:
        return sum(worker["proven"] for worker in httpx.get(f"{url}/health", timeout=5).json()["models"]["tiny"]["workers"]) == 2
    except (httpx.HTTPError, KeyError):
        return False


def status_urls(stack: Stack) -> list[str]:
    folder = Path(stack.file).parent / "discovery"
    found = {line for path in folder.rglob("*") if path.is_file() and "status" in str(path) and "backend" in str(path) for line in _urls(path.read_bytes())}
    return sorted(found)


def _urls(raw: bytes) -> list[str]:
    import re

    return [match.decode() for match in re.findall(rb"http://127\.0\.0\.1:\d+", raw)]


def test_a_workers_metrics_hold_ours_and_vllms(stack: Stack) -> None:
    urls = status_urls(stack)
    assert len(urls) == 2
    for url in urls:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        assert "dynamo_component_requests_total" in text
        assert 'vllm:prompt_tokens_total{engine="0",model_name="tiny"}' in text


def test_an_adapter_is_a_model_of_its_own_as_long_as_it_is_loaded(stack: Stack, tiny_model: Any, tmp_path: Path) -> None:
    adapter = tiny_model.make_adapter(tmp_path / "sql")
    worker = status_urls(stack)[0]

    def models() -> set[str]:
        return {model.id for model in stack.client.models.list()}

    def say(model: str) -> str:
        return stack.client.completions.create(model=model, prompt="Hello", max_tokens=12, temperature=0).choices[0].text

    httpx.post(f"{worker}/control/load_adapter", json={"name": "sql", "path": str(adapter)}, timeout=60).raise_for_status()
    stack.wait(lambda: models() == {"tiny", "sql"}, "an adapter among the models")
    assert say("sql") != say("tiny")
    httpx.post(f"{worker}/control/unload_adapter", json={"name": "sql"}, timeout=60).raise_for_status()
    stack.wait(lambda: models() == {"tiny"}, "the adapter gone")
    assert say("tiny")


def test_answers_go_on_token_for_token_when_an_engine_core_is_killed(stack: Stack) -> None:
    prompts = [ids(3000 + i, 60) for i in range(12)]

    def answer(prompt: list[int]) -> tuple[list[int], list[str]]:
        report = complete(stack.url, prompt, 400, dynamo={"annotations": ["token_ids", "worker"]}).json()["dynamo"]
        return report["token_ids"][0], report["worker"]

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        expected = [tokens for tokens, _ in pool.map(answer, prompts)]
        answers = [pool.submit(answer, prompt) for prompt in prompts]
        time.sleep(0.4)
        victim = stack.cores()[0]
        os.kill(victim.pid, signal.SIGKILL)
        found = [future.result() for future in answers]
    assert [tokens for tokens, _ in found] == expected
    assert any(len(workers) > 1 for _, workers in found), "nobody moved, so nothing was proven"
    stack.wait(lambda: len(stack.cores()) == 2 and sum(worker["proven"] for worker in stack.fleet()) == 2, "whole again")


def test_no_engine_core_outlives_a_worker_that_is_killed(stack: Stack) -> None:
    import psutil

    core = stack.cores()[0]
    os.kill(core.ppid(), signal.SIGKILL)
    _, alive = psutil.wait_procs([core], timeout=30)
    assert not alive
    stack.wait(lambda: len(stack.cores()) == 2 and sum(worker["proven"] for worker in stack.fleet()) == 2, "whole again")


def test_the_stack_ends_in_order_and_leaves_no_engine_core_behind(stack: Stack) -> None:
    cores = stack.cores()
    assert len(cores) == 2
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(60) == 0, "\n".join(stack.lines[-30:])
    import psutil

    _, alive = psutil.wait_procs(cores, timeout=20)
    assert not alive
