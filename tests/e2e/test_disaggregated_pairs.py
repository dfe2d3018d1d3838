"""Prefill and decode as processes of their own that get a request at once and meet over TCP."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

STACK = """
lease_ttl = 2
[frontend]
port = 0
[[workers]]
name = "prefill"
count = 2
engine = {{ use = "sim", role = "prefill", protocol = "bootstrap", block_size = 16, pace_ms = {pace} }}
[[workers]]
name = "decode"
engine = {{ use = "sim", role = "decode", protocol = "bootstrap", block_size = 16, pace_ms = {pace} }}
"""
ALONE = """
[frontend]
port = 0
[[workers]]
engine = { use = "sim", block_size = 16, pace_ms = 1 }
"""


def ask(stack, number: int) -> str:
    body = {"model": "sim", "messages": [{"role": "user", "content": f"number {number}: " + "words to read " * 40}], "max_tokens": 24,
            "dynamo": {"annotations": ["worker"]}}
    answer = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["choices"][0]["message"]["content"] + "|" + " ".join(label.partition("-")[0] for label in said["dynamo"]["worker"])


@pytest.mark.slow
def test_processes_that_meet_say_what_one_process_says_and_go_on_when_one_of_them_is_killed(up) -> None:
    expected = [ask(up(ALONE), i).partition("|")[0] for i in range(1)]
    stack = up(STACK.format(pace=15))
    stack.until(lambda: len([w for w in stack.workers() if w["proven"]]) == 3)
    assert ask(stack, 0) == f"{expected[0]}|prefill decode"
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, stack, i) for i in range(12)]
        victim = next(w["pid"] for w in stack.workers() if w["role"] == "prefill")
        os.kill(victim, signal.SIGKILL)
        told = [answer.result() for answer in answers]
    assert told[0].partition("|")[0] == expected[0]
    assert all(answer.endswith("decode") and "prefill" in answer for answer in told)
