from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import attrs
import httpx
from cyclopts import Parameter
from rich.console import Console

from dynamo_core.cli.http import connect, get, refusal, unreachable
from dynamo_core.cli.options import Key, Url
from dynamo_core.errors import Unavailable

Message = dict[str, str]


def chat(
    prompt: Annotated[str | None, Parameter(name="PROMPT", help="Ask this one thing and leave; without it, a conversation.", show_default=False)] = None,
    /,
    *,
    url: Url = "http://127.0.0.1:8000",
    model: Annotated[str | None, Parameter(name="--model", help="Default: the only model that is served.", show_default=False)] = None,
    key: Key = None,
    max_tokens: Annotated[int, Parameter(name="--max-tokens")] = 512,
) -> None:
    """Talk to a model; answers are shown as they come, with the time to the first token and the speed."""
    console = Console(highlight=False)
    with connect(url, timeout=600.0, key=key) as client:
        model = model or _only_model(client)
        if prompt is not None:
            _ask(client, console, model, [{"role": "user", "content": prompt}], max_tokens)
            return
        console.print(f"[dim]{model} at {url}; an empty line or Ctrl-D ends[/dim]", soft_wrap=True)
        messages: list[Message] = []
        for question in _questions(console):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": _ask(client, console, model, messages, max_tokens)})


def _questions(console: Console) -> Iterator[str]:
    while True:
        try:
            question = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if not question.strip():
            return
        yield question


def _only_model(client: httpx.Client) -> str:
    response = get(client, "/v1/models")
    if response.status_code != 200:
        raise Unavailable(f"{client.base_url} does not list its models: {refusal(response)}")
    listed = response.json()["data"]
    names = [model["id"] for model in listed]
    if not names:
        raise Unavailable(f"no model is ready at {client.base_url}; {str(client.base_url).rstrip('/')}/health says what is missing")
    if len({model.get("root", model["id"]) for model in listed}) == 1:  # one model, perhaps under several names
        return names[0]
    raise Unavailable(f"several models are served; choose one with --model: {', '.join(names)}")


@attrs.define
class Answer:
    """One answer while it arrives."""

    text: str = ""
    started: float = attrs.field(factory=time.monotonic)
    first: float | None = None
    pieces: int = 0
    tokens: int = 0
    decision: str = ""

    def take(self, delta: str) -> None:
        if self.first is None:
            self.first = time.monotonic()
        self.text += delta
        self.pieces += 1

    def speed(self) -> str:
        if self.first is None:
            return "no tokens"
        parts = [f"first token after {(self.first - self.started) * 1000:.0f} ms", f"{self.tokens} tokens"]
        seconds = time.monotonic() - self.first
        if self.pieces > 1 and self.tokens > 1 and seconds > 0:  # one piece says nothing of the speed
            parts.append(f"{(self.tokens - 1) / seconds:.1f} tokens/s")
        return ", ".join(parts + ([f"dynamo explain {self.decision}"] if self.decision else []))


def _ask(client: httpx.Client, console: Console, model: str, messages: list[Message], max_tokens: int) -> str:
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    answer = Answer()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise Unavailable(refusal(response))
            answer.decision = response.headers.get("x-dynamo-decision", "").rpartition(",")[2]
            for event in _events(response):
                _take(event, answer, console)
    except httpx.HTTPError as e:
        raise unreachable(client, e) from e
    console.print()
    console.print(f"[dim]{answer.speed()}[/dim]", soft_wrap=True)
    return answer.text


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def _take(event: dict[str, Any], answer: Answer, console: Console) -> None:
    if error := event.get("error"):
        console.print()
        raise Unavailable(str(error.get("message", error)))
    if usage := event.get("usage"):
        answer.tokens = usage["completion_tokens"]
    for choice in event.get("choices", ()):
        if text := choice.get("delta", {}).get("content"):
            answer.take(text)
            console.out(text, end="", highlight=False)
