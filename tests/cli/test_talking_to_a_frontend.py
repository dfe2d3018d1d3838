"""`explain` and `chat` against a server that speaks HTTP, and against nobody."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dynamo_core.cli import main


class Frontend(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = ["small"]
        self.roots: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.fail_midway = False
        self.key: str | None = None
        """Asked for, if there is one."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Frontend

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def locked(self) -> bool:
        if self.server.key is None or self.headers["authorization"] == f"Bearer {self.server.key}":
            return False
        self.answer(401, {"error": {"message": "who are you?", "type": "authentication_error"}})
        return True

    def do_GET(self) -> None:
        if self.locked():
            return
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": name, "root": self.server.roots.get(name, name)} for name in self.server.models]})
        elif self.path == "/debug/decisions/req%2F1":
            self.answer(200, {"id": "req/1", "text": "request req/1 -> w1\n  * w1 2.10"})
        elif self.path == "/debug/decisions/d-2":
            self.answer(200, {"id": "d-2", "text": "request req/1 -> w2"})
        else:
            self.answer(404, {"error": {"message": "unknown"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.locked():
            return
        self.server.asked.append(body)
        if body["model"] != "small":
            self.answer(404, {"error": {"message": f"there is no model {body['model']}", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("x-dynamo-decision", "d-1")
        self.end_headers()
        for text in ("Hel", "lo [bold]", " wörld"):
            self.event({"choices": [{"index": 0, "delta": {"content": text}}]})
        if self.server.fail_midway:
            self.event({"error": {"message": "the worker is gone"}})
        self.event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, data: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def answer(self, status: int, data: Any) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def frontend() -> Iterator[Frontend]:
    with Frontend() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def nobody() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_explain_prints_the_rendering(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "req/1", "--url", frontend.url]) == 0
    assert capsys.readouterr().out == "request req/1 -> w1\n  * w1 2.10\n"
    assert main(["explain", "req/1", "--url", frontend.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "req/1"


def test_explain_takes_the_header_of_a_request_that_several_workers_served(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "req/1,forgotten,d-2", "--url", frontend.url]) == 0
    assert capsys.readouterr().out == "request req/1 -> w1\n  * w1 2.10\n\nrequest req/1 -> w2\n"
    assert main(["explain", "req/1, d-2", "--url", frontend.url, "--json"]) == 0
    assert [record["id"] for record in json.loads(capsys.readouterr().out)] == ["req/1", "d-2"]
    assert main(["explain", "x,y", "--url", frontend.url]) == 1


def test_explain_of_an_unknown_id_is_exit_1(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "nope", "--url", frontend.url]) == 1
    assert "knows no decision 'nope'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["explain", "x"], ["chat", "hi"], ["chat", "hi", "--model", "m"]])
def test_a_frontend_that_is_not_there_is_exit_1_and_says_so(words: list[str], nobody: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--url", nobody]) == 1
    err = capsys.readouterr().err
    assert f"the frontend at {nobody} does not answer" in err
    assert "--url says where to look" in err


@pytest.mark.parametrize("url", ["nonsense", "http://[", "ftp://x", "http://\0"])
def test_a_url_that_is_none_is_exit_1(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "x", "--url", url]) == 1
    assert capsys.readouterr().err.startswith("dynamo: ")


def test_chat_streams_one_answer_with_its_speed(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hi there", "--url", frontend.url, "--max-tokens", "9"]) == 0
    out = capsys.readouterr().out
    assert "Hello [bold] wörld\n" in out
    assert "first token after" in out
    assert "3 tokens" in out
    assert "dynamo explain d-1\n" in out
    assert frontend.asked == [{"model": "small", "messages": [{"role": "user", "content": "hi there"}], "max_tokens": 9, "stream": True,
                               "stream_options": {"include_usage": True}}]


def test_a_conversation_carries_its_past(frontend: Frontend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["chat", "--url", frontend.url]) == 0
    assert [m["role"] for m in frontend.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert frontend.asked[1]["messages"][1]["content"] == "Hello [bold] wörld"


@pytest.mark.parametrize(("models", "said"), [([], "no model is ready"), (["a", "b"], "choose one with --model: a, b")])
def test_without_exactly_one_model_chat_says_what_there_is(models: list[str], said: str, frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    frontend.models = models
    assert main(["chat", "hi", "--url", frontend.url]) == 1
    assert said in capsys.readouterr().err


def test_a_model_with_several_names_is_the_only_model(frontend: Frontend) -> None:
    frontend.models, frontend.roots = ["small", "Small-0.1B"], {"Small-0.1B": "small"}
    assert main(["chat", "hi", "--url", frontend.url]) == 0
    assert frontend.asked[0]["model"] == "small"


def test_errors_before_and_after_the_first_token_are_exit_1(frontend: Frontend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hi", "--url", frontend.url, "--model", "big"]) == 1
    assert "there is no model big" in capsys.readouterr().err
    frontend.fail_midway = True
    assert main(["chat", "hi", "--url", frontend.url]) == 1
    captured = capsys.readouterr()
    assert "Hello" in captured.out
    assert "the worker is gone" in captured.err


@pytest.mark.parametrize(("words", "said"), [(["chat", "hi"], "first token after"), (["explain", "req/1"], "request req/1 -> w1")])
def test_a_key_opens_a_frontend_that_wants_one(words: list[str], said: str, frontend: Frontend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    frontend.key = "dk_1"
    assert main([*words, "--url", frontend.url]) == 1
    assert "who are you?" in capsys.readouterr().err
    monkeypatch.setenv("KEY", "dk_1")
    (tmp_path / "key").write_text("dk_1\n")
    for key in ("env:KEY", f"file:{tmp_path}/key"):
        assert main([*words, "--url", frontend.url, "--key", key]) == 0
        assert said in capsys.readouterr().out
    assert main([*words, "--url", frontend.url, "--key", "dk_1"]) == 2
    err = capsys.readouterr().err
    assert "--key: " in err
    assert "dk_1" not in err
