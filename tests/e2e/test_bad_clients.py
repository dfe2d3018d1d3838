"""Whatever clients and strangers send to a real stack: a clear answer or a clean close, and nobody else is disturbed."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def steady(echo_stack) -> Iterator[list[str]]:
    """Somebody else, who asks all the time and must get the right answer each time. Gives what went wrong."""
    wrong: list[str] = []
    stop = threading.Event()
    asked = 0

    def ask() -> None:
        nonlocal asked
        with httpx.Client(base_url=echo_stack.url, timeout=30) as client:
            while not stop.is_set():
                try:
                    text = client.post("/v1/completions", json={"model": "echo", "prompt": "steady", "max_tokens": 12}).json()["choices"][0]["text"]
                    if text != "steadysteady":
                        wrong.append(text)
                except Exception as e:
                    wrong.append(repr(e))
                asked += 1
                time.sleep(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    yield wrong
    before = asked
    while asked < before + 3:  # still served after the last insult
        time.sleep(0.01)
    stop.set()
    thread.join()
    assert wrong == []


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def exchange(where: tuple[str, int], data: bytes) -> bytes:
    """Send, and read until the peer closes or says nothing for a while."""
    with socket.create_connection(where, timeout=10) as sock:
        sock.settimeout(2)
        answer = b""
        try:
            sock.sendall(data)
            while more := sock.recv(65536):
                answer += more
        except (TimeoutError, ConnectionError):
            pass
        return answer


@pytest.mark.parametrize(
    "data",
    [b"\x00\x01\x02\xff" * 100, b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
     b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
     b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500)],
    ids=["binary", "no-http", "version", "negative-length", "bad-chunk", "long-target", "tls-hello", "h2-garbage"],
)
def test_garbage_is_refused(echo_stack, steady, data: bytes) -> None:
    answer = exchange(address(echo_stack.url), data)
    assert b" 200 " not in answer[:20]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{not json", 400, "JSON"),
        (b"\xff\xfe\xfd", 400, ""),
        (b'{"model":"echo","messages":[{"role":"user","content":"\xff"}]}', 400, ""),
        (json.dumps(CHAT | {"temprature": 1}).encode(), 400, "temprature"),
        (json.dumps(CHAT | {"max_tokens": -1}).encode(), 400, "max_tokens"),
        (json.dumps(CHAT | {"n": 0}).encode(), 400, "n"),
        (json.dumps(CHAT | {"top_p": 7}).encode(), 400, "top_p"),
        (json.dumps(CHAT | {"max_tokens": 10**30}).encode(), 400, "max_tokens"),
        (json.dumps({"model": "echo", "prompt": [1, -7]}).encode(), 400, ""),
        (json.dumps({"model": "echo", "prompt": [1, 10**9]}).encode(), 400, ""),
        (json.dumps({"model": "echo", "prompt": [1, 2**80]}).encode(), 400, ""),
        (b"[" * 100_000, 400, ""),
        (json.dumps({"model": "echo", "prompt": "x" * 10_000_000}).encode(), 400, "context length"),
        (b" " * (33 * 2**20), 413, "limit"),
    ],
    ids=["json", "utf-8", "utf-8-inside", "unknown-field", "negative", "zero", "range", "huge-number", "negative-token", "unknown-token", "huge-token", "nested",
         "10-MB-prompt", "33-MB-body"],
)
def test_bad_bodies_are_named(echo_stack, steady, body: bytes, status: int, said: str) -> None:
    path = "/v1/completions" if b'"prompt"' in body[:40] else "/v1/chat/completions"
    answer = httpx.post(f"{echo_stack.url}{path}", content=body, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"] + str(error["param"])
    assert {"message", "type", "param", "code"} <= error.keys()
    assert answer.headers["x-request-id"]


def rss(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_flight(stack) -> int:
    return stack.health()["requests_in_progress"]


SLOW = """
[frontend]
port = 0
[[workers]]
engine = { use = "echo", delay = 0.02 }
[[workers]]
engine = { use = "echo", model = "endless", context_length = 1000000 }
"""


@pytest.fixture(scope="module")
def slow_stack(tmp_path_factory: pytest.TempPathFactory, start_stack) -> Iterator:
    running = start_stack(tmp_path_factory.mktemp("slow-stack"), SLOW)
    yield running
    assert running.stop() == 0


def test_a_client_that_reads_a_byte_now_and_then_costs_no_memory_and_holds_up_nobody(slow_stack) -> None:
    """Eight streams, each of 180 MB when it is whole: what the kernel does not hold waits in the engine."""
    pid = slow_stack.health()["pid"]
    body = json.dumps({"model": "endless", "prompt": "slow", "max_tokens": 900_000, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    before = rss(pid)
    socks = []
    for _ in range(8):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address(slow_stack.url))
        sock.sendall(head + body)
        socks.append(sock)
    for _ in range(4):
        for sock in socks:
            assert sock.recv(1)
        quick = httpx.post(f"{slow_stack.url}/v1/completions", json={"model": "echo", "prompt": "abc", "max_tokens": 3}, timeout=30)
        assert quick.json()["choices"][0]["text"] == "abc"
        time.sleep(0.7)
    assert rss(pid) - before < 40 * 2**20
    for sock in socks:
        sock.close()
    slow_stack.until(lambda: in_flight(slow_stack) == 0)


def worker_in_flight(stack) -> int:
    """Requests that the workers' engines are working on, as their own metrics say."""
    found = 0
    for file in (stack.folder / "discovery").rglob("*status%2Fdynamo%2Fbackend*"):
        url = file.read_bytes().split(b"http://")[-1].split(b'"')[0].strip().decode()
        text = httpx.get(f"http://{url}/metrics").text
        found += int(float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith("dynamo_component_inflight_requests{"))))
    return found


def test_a_client_that_leaves_frees_the_engine(slow_stack) -> None:
    stack = slow_stack
    body = {"model": "echo", "prompt": "slow", "max_tokens": 8000}
    for stream in (True, False):
        leaving = socket.create_connection(address(stack.url))
        content = json.dumps(body | {"stream": stream}).encode()
        leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
        stack.until(lambda: worker_in_flight(stack) == 1)
        leaving.close()
        stack.until(lambda: worker_in_flight(stack) == 0 and in_flight(stack) == 0, timeout=10)


@pytest.mark.parametrize("data", [b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff" + b"x" * 1000, os.urandom(5000)], ids=["zeros", "http", "huge-frame", "random"])
def test_garbage_on_the_plane_of_a_worker_is_dropped(echo_stack, steady, data: bytes) -> None:
    for worker in echo_stack.workers():
        exchange(address(worker["address"]), data)
    assert len(echo_stack.workers()) == 2
    assert all(worker["proven"] for worker in echo_stack.workers())
