"""What a request may ask for, on stacks of real processes: simulated workers always, the embedded real engine in the slow run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

SIM = """
[frontend]
port = 0
[[workers]]
count = 2
engine = { use = "sim", speedup = 100 }
"""
LLAMA = """
[frontend]
port = 0
[[workers]]
count = 1
engine = { use = "llamacpp", model = "smollm2", slots = 2 }
"""


@pytest.fixture(scope="module", params=["sim", pytest.param("smollm2", marks=pytest.mark.slow)])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, start_stack) -> Iterator[Any]:
    running = start_stack(tmp_path_factory.mktemp(f"{request.param}-stack"), SIM if request.param == "sim" else LLAMA, timeout=300.0)
    running.model = next(iter(running.health()["models"]))
    yield running
    assert running.stop() == 0


@pytest.fixture
def ask(stack):
    """`ask(prompt=..., ...)`: the whole answer of /v1/completions, and its headers."""
    with httpx.Client(base_url=stack.url, timeout=120) as client:

        def asking(path: str = "/v1/completions", status: int = 200, headers: dict[str, str] | None = None, **body: Any) -> tuple[dict[str, Any], httpx.Headers]:
            answer = client.post(path, json={"model": stack.model, "temperature": 0} | body, headers=headers)
            assert answer.status_code == status, answer.text
            return answer.json(), answer.headers

        yield asking


def events(stack, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{stack.url}{path}", json={"model": stack.model, "temperature": 0, "stream": True} | body, timeout=120) as response:
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]


def text(answer: dict[str, Any], index: int = 0) -> str:
    return answer["choices"][index]["text"]


def test_a_stream_is_the_whole_answer_in_pieces(stack, ask) -> None:
    whole, _ = ask(prompt="Once upon a time", max_tokens=20, ignore_eos=True)
    pieces = events(stack, prompt="Once upon a time", max_tokens=20, ignore_eos=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert "".join(choice["text"] for event in pieces for choice in event["choices"]) == text(whole)
    counts = [event["usage"]["completion_tokens"] for event in pieces if event.get("usage")]
    assert counts == sorted(counts)
    assert counts[-1] == 20 == whole["usage"]["completion_tokens"]


def test_several_choices_are_numbered_and_counted(stack, ask) -> None:
    answer, _ = ask(prompt="Once", n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 18
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    streamed = events(stack, prompt="Once", n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    assert {choice["index"] for event in streamed for choice in event["choices"]} == {0, 1, 2}


def test_a_seed_repeats_and_another_differs(ask) -> None:
    drawn = [text(ask(prompt="Tell me", temperature=1.5, seed=seed, max_tokens=16, ignore_eos=True)[0]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_stop_string_ends_the_text_wherever_tokens_were_cut(stack, ask) -> None:
    whole = text(ask(prompt="Once upon a time", max_tokens=24, ignore_eos=True)[0])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    cut, _ = ask(prompt="Once upon a time", max_tokens=24, ignore_eos=True, stop=[stop])
    assert text(cut) == whole[: whole.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 24
    pieces = events(stack, prompt="Once upon a time", max_tokens=24, ignore_eos=True, stop=[stop])
    assert "".join(choice["text"] for event in pieces for choice in event["choices"]) == text(cut)
    stack.until(lambda: stack.health()["requests_in_progress"] == 0)


def test_echo_returns_the_prompt_first(ask) -> None:
    answer, _ = ask(prompt="Once upon", echo=True, max_tokens=4, ignore_eos=True)
    assert text(answer).startswith("Once upon")
    assert len(text(answer)) > len("Once upon")


def test_several_prompts_are_several_choices(ask) -> None:
    answer, headers = ask(prompt=["Once upon", "The sea"], max_tokens=5, ignore_eos=True)
    alone = [text(ask(prompt=prompt, max_tokens=5, ignore_eos=True)[0]) for prompt in ("Once upon", "The sea")]
    assert [text(answer, i) for i in (0, 1)] == alone
    assert len(headers["x-dynamo-decision"].split(",")) == 2


def test_a_dry_run_decides_and_generates_nothing(stack, ask) -> None:
    answer, _ = ask(prompt="Where to?", dynamo={"dry_run": True})
    assert answer["object"] == "dynamo.decision"
    assert answer["record"]["id"] == answer["decision"]
    assert "dry run" in answer["record"]["text"]


def test_a_request_goes_where_it_is_pinned_and_nowhere_else(stack, ask) -> None:
    for worker in stack.workers():
        answer, _ = ask(prompt="There", max_tokens=2, dynamo={"instance": int(worker["id"], 16), "annotations": ["worker"]})
        assert answer["dynamo"]["worker"] == [worker["label"]]
        by_header, _ = ask(prompt="There", max_tokens=2, dynamo={"annotations": ["worker"]}, headers={"x-dynamo-instance": str(int(worker["id"], 16))})
        assert by_header["dynamo"]["worker"] == [worker["label"]]
    nobody, _ = ask(prompt="There", max_tokens=2, dynamo={"instance": 12345}, status=503)
    assert nobody["error"]["code"] == "no_worker"


def test_annotations_report_what_they_name(ask) -> None:
    names = ["request_id", "worker", "decision", "timing", "token_ids", "prompt_token_ids", "formatted_prompt"]
    answer, headers = ask("/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=3, ignore_eos=True,
                          dynamo={"annotations": names, "priority": 7, "session": "s-1"})
    report = answer["dynamo"]
    assert set(report) == set(names)
    assert report["request_id"] == headers["x-request-id"]
    assert report["decision"] == [headers["x-dynamo-decision"]]
    assert len(report["token_ids"][0]) == 3
    assert len(report["prompt_token_ids"][0]) == answer["usage"]["prompt_tokens"]
    assert "hello" in report["formatted_prompt"][0]


def test_logprobs_come_where_the_engine_has_them_and_are_refused_elsewhere(stack, ask) -> None:
    wanted = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    if stack.model == "sim":
        refused, _ = ask("/v1/chat/completions", status=400, **wanted)
        assert "logprobs" in refused["error"]["message"]
        return
    answer, _ = ask("/v1/chat/completions", **wanted)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in entries)
    assert "".join(entry["token"] for entry in entries) == answer["choices"][0]["message"]["content"]


def test_a_prompt_that_does_not_fit_is_the_clients_error_and_the_next_one_is_served(ask) -> None:
    answer, _ = ask(prompt=[1] * 40_000, max_tokens=1, status=400)
    assert answer["error"]["code"] == "context_length_exceeded"
    assert text(ask(prompt="Once", max_tokens=2, ignore_eos=True)[0])
