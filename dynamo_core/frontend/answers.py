"""Whole answers: what a client gets that did not ask for a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynamo_core.frontend.chunks import FINISH, chat_logprobs, encode, encode_usage, finite, legacy_logprobs
from dynamo_core.types import Delta, LogprobText, Usage


class _Choice:
    __slots__ = ("finish_reason", "logprobs", "stop_reason", "text")

    def __init__(self, echo: str) -> None:
        self.text: list[str] = [echo] if echo else []
        self.logprobs: list[LogprobText | None] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None


class Answer:
    """Collects the deltas of all choices. Subclasses know the shape of a choice."""

    object: str

    def __init__(self, choices: int, echo: Sequence[str] = ()) -> None:
        self.choices = [_Choice(echo[index] if echo else "") for index in range(choices)]
        self.open = choices

    def add(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            choice = self.choices[delta.index]
            if delta.text:
                choice.text.append(delta.text)
            if delta.logprobs:
                choice.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                choice.finish_reason = FINISH.get(delta.finish_reason, delta.finish_reason)
                choice.stop_reason = delta.stop_reason
                self.open -= 1

    def encode(
        self, id: str, created: int, model: str, usage: Usage, prompt_logprobs: Sequence[LogprobText | None] | None, report: dict[str, Any] | None
    ) -> bytes:
        choices: list[dict[str, Any]] = []
        for index, choice in enumerate(self.choices):
            rendered = {"index": index} | self._render(choice, prompt_logprobs) | {"finish_reason": choice.finish_reason or "stop"}
            if choice.stop_reason is not None:
                rendered["stop_reason"] = choice.stop_reason
            choices.append(rendered)
        top: dict[str, Any] = {"id": id, "object": self.object, "created": created, "model": model, "choices": choices}
        if prompt_logprobs is not None:
            top["prompt_logprobs"] = [_prompt_logprob(entry) for entry in prompt_logprobs]
        if report is not None:
            top["dynamo"] = report
        return encode(top)[:-1] + b',"usage":' + encode_usage(usage) + b"}"

    def _render(self, choice: _Choice, prompt_logprobs: Sequence[LogprobText | None] | None) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    object = "chat.completion"

    def _render(self, choice: _Choice, prompt_logprobs: Sequence[LogprobText | None] | None) -> dict[str, Any]:
        logprobs = chat_logprobs([entry for entry in choice.logprobs if entry is not None])
        return {"message": {"role": "assistant", "content": "".join(choice.text), "refusal": None}, "logprobs": logprobs}


class CompletionAnswer(Answer):
    object = "text_completion"

    def __init__(self, choices: int, echo: Sequence[str] = ()) -> None:
        super().__init__(choices, echo)
        self._echoed = bool(echo)

    def _render(self, choice: _Choice, prompt_logprobs: Sequence[LogprobText | None] | None) -> dict[str, Any]:
        entries = choice.logprobs
        if self._echoed and entries and prompt_logprobs:
            entries = [*prompt_logprobs, *entries]
        return {"text": "".join(choice.text), "logprobs": legacy_logprobs(entries, 0) if entries else None}


def _prompt_logprob(entry: LogprobText | None) -> dict[str, Any] | None:
    """By token id: the prompt's own token first, then the alternatives."""
    if entry is None or math.isnan(entry.logprob):
        return None
    return {str(e.token_id): {"logprob": finite(e.logprob), "decoded_token": e.token} for e in (entry, *entry.top)}
