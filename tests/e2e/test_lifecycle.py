"""How stacks of real processes start, end, lose their store and come back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

STACK = """
lease_ttl = 2
[frontend]
port = 0
drain_timeout = 3
[[workers]]
count = 2
engine = { use = "echo", delay = 0.01 }
drain_timeout = 3
"""


def ask(stack, prompt: str = "abc") -> str:
    answer = httpx.post(f"{stack.url}/v1/completions", json={"model": "echo", "prompt": prompt, "max_tokens": len(prompt)}, timeout=60)
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_up_finishes_what_is_in_progress_and_leaves_nothing_behind(up, is_alive, number: int) -> None:
    stack = up(STACK)
    children = stack.children()
    assert len(children) == 3
    with httpx.stream("POST", f"{stack.url}/v1/completions", json={"model": "echo", "prompt": "x" * 80, "max_tokens": 80, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        stack.process.send_signal(number)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert "error" not in "".join(rest)
    assert stack.process.wait(timeout=60) == 0
    assert not any(is_alive(pid) for pid in children)
    assert stack.left_behind() == []
    assert "Traceback" not in stack.text
    assert stack.lines[-1] == "stopped\n"


@pytest.mark.slow
def test_children_end_when_up_is_killed(up, is_alive) -> None:
    stack = up(STACK)
    children = stack.children()
    stack.process.kill()
    stack.until(lambda: not any(is_alive(pid) for pid in children))
    assert stack.left_behind() == []


@pytest.mark.slow
def test_a_second_signal_ends_at_once(up, is_alive) -> None:
    stack = up(STACK.replace("drain_timeout = 3", "drain_timeout = 300").replace("delay = 0.01", "delay = 1"))
    children = stack.children()
    with socket.create_connection((httpx.URL(stack.url).host, httpx.URL(stack.url).port or 0)) as client:
        body = b'{"model": "echo", "prompt": "x", "max_tokens": 5000, "stream": true}'
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert client.recv(20)
        stack.process.send_signal(signal.SIGTERM)
        stack.until(lambda: "stopping" in stack.text)
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(timeout=20) == 128 + signal.SIGTERM
        stack.until(lambda: not any(is_alive(pid) for pid in children), timeout=20)


@pytest.mark.slow
def test_a_store_that_loses_everything_has_everything_again(up) -> None:
    stack = up(STACK)
    before = {worker["id"] for worker in stack.workers()}
    shutil.rmtree(stack.folder / "discovery")
    stack.until(lambda: stack.health()["status"] == "degraded")
    assert "cannot read the discovery directory" in stack.health()["problems"]["discovery"]
    assert ask(stack) == "abc", "what is known stays in use"
    after = stack.until(lambda: stack.health()["status"] == "healthy" and len(ids := {w["id"] for w in stack.workers() if w["proven"]}) == 2 and not ids & before and ids)
    assert after
    assert ask(stack) == "abc"

    def listed(kind: str) -> int:
        return len([name for name in os.listdir(stack.folder / "discovery" / "keys") if name.startswith(f"v1%2F{kind}")])

    assert listed("instances") == 2
    stack.until(lambda: listed("status") == 3)  # every process finds its own loss, the frontend perhaps last


@pytest.mark.slow
def test_a_worker_that_stands_still_for_longer_than_its_lease_comes_back_under_a_new_id(up) -> None:
    stack = up(STACK)
    victim = stack.workers()[0]
    os.kill(victim["pid"], signal.SIGSTOP)
    try:
        stack.until(lambda: victim["id"] not in {worker["id"] for worker in stack.workers()})
        assert ask(stack) == "abc"
    finally:
        os.kill(victim["pid"], signal.SIGCONT)
    stack.until(lambda: victim["pid"] in {worker["pid"] for worker in stack.workers() if worker["proven"]})
    assert victim["id"] not in {worker["id"] for worker in stack.workers()}


@pytest.mark.slow
def test_a_corrupt_discovery_file_is_named_and_skipped(up) -> None:
    stack = up(STACK)
    keys = stack.folder / "discovery" / "keys"
    bad = keys / "v1%2Finstances%2Fdynamo%2Fbackend%2Fgenerate%2F00000000deadbeef=1"
    bad.write_bytes(os.urandom(300))
    stack.until(lambda: stack.health()["status"] == "degraded")
    assert "deadbeef" in str(stack.health()["problems"])
    assert ask(stack) == "abc"
    bad.unlink()
    stack.until(lambda: stack.health()["status"] == "healthy")


@pytest.mark.slow
def test_a_frontend_that_is_killed_takes_no_other_with_it(up) -> None:
    stack = up(STACK.replace("port = 0", "port = 0\nprocesses = 2"))
    first = stack.health()["pid"]
    other = stack.until(lambda: (pid := stack.health()["pid"]) != first and pid)
    os.kill(first, signal.SIGKILL)
    stack.until(lambda: "frontend" in stack.text and "starting again" in stack.text)
    answers = [ask(stack) for _ in range(20)]
    assert answers == ["abc"] * 20
    assert other in {stack.health()["pid"] for _ in range(20)}
    stack.until(lambda: len({stack.health()["pid"] for _ in range(20)}) == 2)


def dynamo(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dynamo_core.cli", *arguments], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("command", ["frontend", pytest.param("up", marks=pytest.mark.slow), pytest.param("demo", marks=pytest.mark.slow)])
def test_a_port_that_is_taken_is_a_sentence(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "stack.toml"
        path.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/d" }}\nfrontend = {{ port = {port} }}\n[[workers]]\nengine = {{ use = "echo" }}\n')
        ended = dynamo(command, str(path))
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, said
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_a_sentence_with_the_last_lines_of_the_child(tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/d" }}\nfrontend = {{ port = 0 }}\n[[workers]]\nengine = {{ use = "llamacpp", model = "{tmp_path}/no.gguf" }}\n')
    ended = dynamo("demo", str(path))
    said = ended.stdout + ended.stderr
    assert ended.returncode in (1, 2), said
    assert "no.gguf" in said
    assert re.search(r"backend-0 ended with exit code \d; its last lines say why", said)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_stack_that_does_not_get_ready_in_time_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/d" }}\nfrontend = {{ port = 0 }}\n[[workers]]\nengine = {{ use = "echo", delay = 60 }}\ncanary_timeout = 100\n')
    ended = dynamo("up", str(path), "--timeout", "6", "--quiet")
    assert ended.returncode == 1, ended.stderr
    assert re.search(r"dynamo: the stack is not ready after 6 s: (0 of 1 workers ready|starting the frontend)", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_several_workers_cannot_share_one_status_port_and_are_told_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "stack.toml"
        path.write_text(f'discovery = {{ use = "file", path = "{tmp_path}/d" }}\nstatus = {{ port = {port} }}\n[[workers]]\nengine = {{ use = "echo" }}\n')
        ended = dynamo("worker", str(path))
    assert ended.returncode == 2
    assert f"the status endpoint cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "leave status.port out" in ended.stderr
    assert "Traceback" not in ended.stderr
