"""Server-sent events, built from bytes that are prepared once per request and choice; only what changes is encoded.

This is the hot path: one call per read, whatever it merged, and no object per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from dynamo_core.types import Delta, LogprobText, Usage

DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode

FINISH: dict[str, str] = {"abort": "stop", "error": "stop"}
"""Finish reasons that OpenAI's clients do not know."""


class Chunks:
    """Writes the chunks of one streamed answer. Subclasses know the shape of a choice."""

    object: str
    __slots__ = ("_continuous", "_echo", "_finals", "_head", "_include_usage", "_prefixes", "_started", "_suffix", "_tail", "open")

    def __init__(self, id: str, created: int, model: str, choices: int, *, include_usage: bool, continuous_usage: bool, echo: Sequence[str] = ()) -> None:
        self._head = encode({"id": id, "object": self.object, "created": created, "model": model})[:-1]
        self._include_usage = include_usage
        self._continuous = continuous_usage
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._started = [False] * choices
        self._echo = echo
        self.open = choices
        """Choices that have not finished."""
        self._prefixes: list[bytes] = [self._prefix(index) for index in range(choices)]
        self._suffix = self._choice_end + self._tail

    _choice_end: bytes

    def _prefix(self, index: int) -> bytes:
        raise NotImplementedError

    def _first(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError

    def _with_logprobs(self, index: int, delta: Delta) -> bytes:
        raise NotImplementedError

    def _final(self, index: int, reason: str, delta: Delta) -> bytes:
        raise NotImplementedError

    def write(self, deltas: Sequence[Delta], usage: Usage) -> bytes:
        """The events of one read: at most two for each choice (text, then the reason why it ended)."""
        tail = b',"usage":' + encode_usage(usage) + b"}\n\n" if self._continuous else self._tail
        if len(deltas) == 1:
            delta = deltas[0]
            if delta.finish_reason is None and delta.logprobs is None and self._started[delta.index]:
                if not delta.text:
                    return b""
                if not self._continuous:
                    return self._prefixes[delta.index] + encode(delta.text) + self._suffix
        parts: list[bytes] = []
        for delta in deltas:
            index = delta.index
            if delta.text or delta.logprobs or (delta.finish_reason is not None and not self._started[index]):
                if not self._started[index]:
                    self._started[index] = True
                    if self._echo:
                        delta.text = self._echo[index] + delta.text
                    parts += (self._first(index, delta), tail)
                elif delta.logprobs:
                    parts += (self._with_logprobs(index, delta), tail)
                else:
                    parts += (self._prefixes[index], encode(delta.text), self._choice_end, tail)
            if delta.finish_reason is not None:
                self.open -= 1
                parts += (self._final(index, FINISH.get(delta.finish_reason, delta.finish_reason), delta), tail)
        return b"".join(parts)

    def end(self, usage: Usage, report: dict[str, Any] | None) -> bytes:
        """The chunk without choices (usage, and the report of the `dynamo` extension), if one is wanted, and the end mark."""
        if not self._include_usage and report is None:
            return DONE
        parts = [b"data: ", self._head, b',"choices":[]']
        if self._include_usage:
            parts += (b',"usage":', encode_usage(usage))
        if report is not None:
            parts += (b',"dynamo":', encode(report))
        parts += (b"}\n\n", DONE)
        return b"".join(parts)


class ChatChunks(Chunks):
    object = "chat.completion.chunk"
    __slots__ = ()
    _choice_end = b'},"logprobs":null,"finish_reason":null}]'

    def _choice(self, index: int) -> bytes:
        return b'data: %b,"choices":[{"index":%d,"delta":{' % (self._head, index)

    def _prefix(self, index: int) -> bytes:
        return self._choice(index) + b'"content":'

    def _first(self, index: int, delta: Delta) -> bytes:
        return b'%b"role":"assistant","content":%b},"logprobs":%b,"finish_reason":null}]' % (
            self._choice(index),
            encode(delta.text),
            encode(chat_logprobs(delta.logprobs)),
        )

    def _with_logprobs(self, index: int, delta: Delta) -> bytes:
        return b'%b%b},"logprobs":%b,"finish_reason":null}]' % (self._prefixes[index], encode(delta.text), encode(chat_logprobs(delta.logprobs)))

    def _final(self, index: int, reason: str, delta: Delta) -> bytes:
        return b'%b},"logprobs":null,"finish_reason":"%b"%b}]' % (self._choice(index), reason.encode(), stop_reason(delta))


class CompletionChunks(Chunks):
    object = "text_completion"
    __slots__ = ("_offsets", "prompt_logprobs")
    _choice_end = b',"logprobs":null,"finish_reason":null}]'

    def __init__(self, id: str, created: int, model: str, choices: int, *, include_usage: bool, continuous_usage: bool, echo: Sequence[str] = ()) -> None:
        super().__init__(id, created, model, choices, include_usage=include_usage, continuous_usage=continuous_usage, echo=echo)
        self._offsets = [0] * choices
        self.prompt_logprobs: Sequence[LogprobText | None] | None = None
        """With `echo`: reported before the first token's own."""

    def _prefix(self, index: int) -> bytes:
        return b'data: %b,"choices":[{"index":%d,"text":' % (self._head, index)

    def _first(self, index: int, delta: Delta) -> bytes:
        return self._with_logprobs(index, delta)

    def _with_logprobs(self, index: int, delta: Delta) -> bytes:
        entries: list[LogprobText | None] | None = list(delta.logprobs) if delta.logprobs else None
        if self.prompt_logprobs is not None and self._offsets[index] == 0:
            entries = [*self.prompt_logprobs, *(entries or ())]
        rendered = None if entries is None else legacy_logprobs(entries, self._offsets[index])
        if entries is not None:
            self._offsets[index] += sum(len(e.token) for e in entries if e is not None)
        return b'%b%b,"logprobs":%b,"finish_reason":null}]' % (self._prefixes[index], encode(delta.text), encode(rendered))

    def _final(self, index: int, reason: str, delta: Delta) -> bytes:
        return b'%b"","logprobs":null,"finish_reason":"%b"%b}]' % (self._prefixes[index], reason.encode(), stop_reason(delta))


def stop_reason(delta: Delta) -> bytes:
    """Which stop string or token ended the choice: an addition to OpenAI's shape, there only when there is something to say."""
    return b"" if delta.stop_reason is None else b',"stop_reason":' + encode(delta.stop_reason)


def encode_usage(usage: Usage) -> bytes:
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}' % (
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        usage.cached_tokens,
    )


def chat_logprobs(entries: Sequence[LogprobText] | None) -> dict[str, Any] | None:
    if not entries:
        return None
    return {
        "content": [
            {
                "token": e.token,
                "logprob": finite(e.logprob),
                "bytes": e.bytes,
                "top_logprobs": [{"token": t.token, "logprob": finite(t.logprob), "bytes": t.bytes} for t in e.top],
            }
            for e in entries
        ],
        "refusal": None,
    }


def legacy_logprobs(entries: Sequence[LogprobText | None], offset: int) -> dict[Literal["tokens", "token_logprobs", "top_logprobs", "text_offset"], Any]:
    """:param offset: characters of this choice before the first entry."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for e in entries:
        offsets.append(offset)
        if e is None:
            tokens.append("")
            logprobs.append(None)
            top.append(None)
            continue
        tokens.append(e.token)
        logprobs.append(None if math.isnan(e.logprob) else finite(e.logprob))  # the first token of a prompt has no probability
        top.append({t.token: finite(t.logprob) for t in e.top} if e.top else None)
        offset += len(e.token)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}


def finite(logprob: float) -> float:
    """JSON has no infinity: what is impossible becomes very unlikely, as elsewhere."""
    return logprob if logprob >= -9999.0 else -9999.0
