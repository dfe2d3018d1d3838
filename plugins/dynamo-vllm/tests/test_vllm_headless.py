"""One vLLM on two nodes: the one with the head behind a frontend, the other without, each a process tree of its own on this machine."""

from __future__ import annotations

import contextlib
import os
import random
import re
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

from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.errors import ConfigError
from dynamo_core.types import Request, Sampling, Stops

pytestmark = pytest.mark.slow

PATIENCE = 240.0
ARGS = 'max_model_len = 512, max_num_seqs = 16, kv_cache_memory_bytes = 33554432, block_size = 32, dtype = "float32"'
BLOCKS = (32 << 20) // (32 * 2 * 2 * 2 * 32 * 4)
"""The memory of one rank, over tokens of a block, layers, keys and values, heads, width, and bytes of a number."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def two_ports() -> int:
    """The first of two that are free, among those that no connection takes by chance."""
    while True:
        port = random.randrange(20_000, 30_000)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


@attrs.define(eq=False)
class Started:
    """A `dynamo` command that runs."""

    command: tuple[str, ...]
    process: subprocess.Popen[str]
    lines: list[str]

    @classmethod
    def run(cls, *command: str) -> Started:
        lines: list[str] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1"}
        process = subprocess.Popen([sys.executable, "-m", "dynamo_core.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout or ()), daemon=True).start()
        return cls(command, process, lines)

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"never {what}:\n" + "\n".join(self.lines[-40:])
            assert self.process.poll() is None, f"{self.command} ended:\n" + "\n".join(self.lines[-40:])
            time.sleep(0.1)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


@attrs.define(eq=False)
class Fleet:
    folder: Path
    url: str
    stack: Started
    node: Started

    def ready(self) -> bool:
        try:
            models = httpx.get(f"{self.url}/health", timeout=10).json()["models"]
        except httpx.HTTPError:
            return False
        return any(worker["proven"] for worker in models.get("tiny", {}).get("workers", []))

    def records(self, kind: str) -> list[Path]:
        """What discovery knows."""
        return [path for path in (self.folder / "discovery").rglob(f"v1%2F{kind}%2F*") if path.is_file()]

    def status(self, worker: str) -> str:
        (found,) = [re.search(rb"http://[\d.:]+", path.read_bytes()) for path in self.records("status") if worker in path.name]
        assert found is not None
        return found[0].decode()

    def complete(self, prompt: list[int], max_tokens: int = 4, **dynamo: Any) -> dict[str, Any]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
                "dynamo": {"annotations": ["token_ids", "worker"], **dynamo}}  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="module")
def fleet(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder, port, rpc = tmp_path_factory.mktemp("nodes"), free_port(), two_ports()
    group = f'data_parallel_size = 2, data_parallel_size_local = 1, data_parallel_address = "127.0.0.1", data_parallel_rpc_port = {rpc}'
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
canary_timeout = 60.0
engine = {{ use = "vllm", model = "{tiny}", args = {{ {ARGS}, {group} }} }}

[[workers]]
name = "node1"
count = 0
engine = {{ use = "vllm", model = "{tiny}", headless = true, args = {{ {ARGS}, {group}, data_parallel_start_rank = 1 }} }}
""")
    found = Fleet(folder, f"http://127.0.0.1:{port}", Started.run("up", str(file)), Started.run("worker", str(file), "--index", "1"))
    try:
        found.stack.wait(lambda: any(line.startswith("ready:") for line in found.stack.lines), "ready")
        yield found
    finally:
        found.stack.end()
        found.node.end()


def ids(seed: int, length: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(4, 1000) for _ in range(length)]


def test_ranks_of_both_nodes_are_one_worker_and_say_the_same(fleet: Fleet) -> None:
    reports = [fleet.complete(ids(1, 70), 24, dp_rank=rank)["dynamo"] for rank in (0, 1)]
    assert reports[0]["token_ids"] == reports[1]["token_ids"]
    (first,), (second,) = (report["worker"] for report in reports)
    assert (first[-2:], second[-2:], first[:-2]) == ("/0", "/1", second[:-2])


def test_the_router_predicts_the_cache_of_the_other_node(fleet: Fleet) -> None:
    prompt = ids(2, 200)
    fleet.complete(prompt, dp_rank=1)

    def predicted() -> list[int]:
        return sorted(map(int, fleet.complete(prompt, dry_run=True)["record"]["columns"]["kv.overlap_tokens"]["values"]))

    fleet.stack.wait(lambda: predicted() == [0, 192], "a prediction")
    answer = fleet.complete(prompt)
    assert answer["dynamo"]["worker"][0].endswith("/1"), "its prompt is there"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


def test_the_other_node_is_healthy_and_serves_nobody(fleet: Fleet) -> None:
    assert httpx.get(f"{fleet.status('node1')}/health", timeout=30).json()["status"] == "ready"
    assert "process_resident_memory_bytes" in httpx.get(f"{fleet.status('node1')}/metrics", timeout=30).text
    for kind in ("instances", "models"):
        assert [path.name for path in fleet.records(kind) if "node1" in path.name] == []
        assert len(fleet.records(kind)) == 1


def test_the_head_exports_what_is_known_of_every_rank(fleet: Fleet) -> None:
    fleet.complete(ids(3, 40), dp_rank=0)

    def metrics() -> str:
        return httpx.get(f"{fleet.status('backend')}/metrics", timeout=30).text

    for rank in "01":
        fleet.stack.wait(lambda rank=rank: re.search(rf'dynamo_component_kv_cache_usage{{.*dp_rank="{rank}"', metrics()), f"load of rank {rank}")
        assert re.search(rf'vllm:prompt_tokens_total{{engine="{rank}",model_name="tiny"}} [1-9]', metrics())
    assert re.search(rf"dynamo_component_total_blocks{{.*}} {float(BLOCKS)}\n", metrics()), "blocks are those of one rank"


def test_a_node_that_is_killed_ends_its_engine_and_a_new_one_makes_it_whole(fleet: Fleet) -> None:
    (before,) = fleet.complete(ids(4, 40), dp_rank=1)["dynamo"]["worker"]
    fleet.node.process.kill()
    fleet.stack.wait(lambda: any("(rank 1) of this engine is gone" in line for line in fleet.stack.lines), "seen")
    fleet.stack.wait(lambda: any("ended (exit code 1)" in line for line in fleet.stack.lines), "ended")
    fleet.node = Started.run(*fleet.node.command)
    fleet.node.wait(lambda: fleet.ready(), "whole again")
    fleet.stack.wait(lambda: fleet.complete(ids(4, 40), dp_rank=1)["dynamo"]["worker"] != [before], "a new engine")


def test_a_node_that_is_told_to_end_ends_the_engine_in_order(fleet: Fleet) -> None:
    before = len(fleet.stack.lines)
    fleet.node.process.send_signal(signal.SIGTERM)
    assert fleet.node.process.wait(60) == 0, "\n".join(fleet.node.lines[-30:])
    assert any("(rank 1) is leaving" in line for line in fleet.stack.lines[before:])
    fleet.stack.wait(lambda: any("ended (exit code 1)" in line for line in fleet.stack.lines[before:]), "ended")


def test_a_head_that_waits_for_others_can_be_killed_and_stopped_and_leaves_nothing_behind(fleet: Fleet) -> None:
    import psutil

    def below(process: Any) -> dict[Any, str]:
        names: dict[Any, str] = {}
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                names[child] = f"{child.name()} {' '.join(child.cmdline())}"
        return names

    def wait_for_head() -> tuple[Any, list[Any]]:
        """A head whose own part is up, and what it has started."""
        stack = psutil.Process(fleet.stack.process.pid)
        fleet.stack.wait(lambda: any("VLLM::Worker" in name for name in below(stack).values()), "started again")
        (head,) = [process for process, name in below(stack).items() if "dynamo_core.cli worker" in name]
        found = below(head)
        assert any("DPCoordinator" in name for name in found.values())
        return head, list(found)

    head, processes = wait_for_head()
    head.kill()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    _, processes = wait_for_head()
    fleet.stack.process.send_signal(signal.SIGINT)
    assert fleet.stack.process.wait(60) == 0, "\n".join(fleet.stack.lines[-30:])
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


# ------------------------------------------------------------------ one rank on two nodes, and mistakes


async def say(engine: Any, context: EngineContext | None = None) -> list[int]:
    await engine.start(context or EngineContext())
    request = Request(id="test", model="tiny", token_ids=ids(5, 80), sampling=Sampling(temperature=0.0), stops=Stops(max_tokens=24, ignore_eos=True))
    return [token async for output in engine.generate(request, Context("test")) for token in output.token_ids]


async def test_a_rank_whose_tensors_lie_on_two_nodes_says_what_one_node_says(tiny: Path, tmp_path: Path, make_engine: Callable[..., Any]) -> None:
    port = two_ports()
    group = f'tensor_parallel_size = 2, nnodes = 2, master_addr = "127.0.0.1", master_port = {port}, distributed_executor_backend = "mp"'
    file = tmp_path / "node.toml"
    file.write_text(f"""
[[workers]]
engine = {{ use = "vllm", model = "{tiny}", headless = true, args = {{ {ARGS}, {group}, node_rank = 1 }} }}
""")
    node = Started.run("worker", str(file))
    alone = make_engine()
    spread = make_engine(args={"tensor_parallel_size": 2, "nnodes": 2, "node_rank": 0, "master_addr": "127.0.0.1", "master_port": port,
                               "distributed_executor_backend": "mp"})  # fmt: skip
    try:
        expected = await say(alone)
        await alone.stop()
        assert await say(spread) == expected
    finally:
        await alone.stop()
        await spread.stop()
        try:
            assert node.process.wait(60) == 1, "\n".join(node.lines[-30:])
        finally:
            node.process.kill()


async def test_a_headless_node_that_does_not_say_which_part_it_runs_is_told_how(make_engine: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="which part") as raised:
        await make_engine(headless=True).start(EngineContext())
    assert "data_parallel_start_rank" in raised.value.problems[0].remedy


async def test_nodes_with_a_head_each_are_refused(make_engine: Callable[..., Any]) -> None:
    args = {"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_start_rank": 1}
    with pytest.raises(ConfigError, match="where each node has a head of its own") as raised:
        await make_engine(args=args).start(EngineContext())
    assert "headless" in raised.value.problems[0].remedy
