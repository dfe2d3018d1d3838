"""What a server answers to `/v1/completions`, as outputs: one for each choice and read, whatever number of events it had."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import DynamoError, EngineDead, EngineFailed, RequestError, WorkerOverloaded
from dynamo_core.types import Output, Request, TokenLogprob

_TOKEN = "token_id:"
_LONGEST = 8 << 20
"""Bytes of one event."""
_NONSENSE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_DEAD = re.compile(r"EngineDead|EngineCore", re.IGNORECASE)


_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class _Logprobs(msgspec.Struct, gc=False):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    token_ids: list[_Token] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, _PromptLogprob] | None] | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Reader:
    """The outputs of one request, from the bytes of its answer."""

    __slots__ = ("_ends", "_held", "_k", "_open", "_prompt", "_rest", "_top", "over")

    def __init__(self, request: Request, card: ModelCard) -> None:
        self.over = False
        """Every choice has ended, and nothing more is to come."""
        self._ends = card.eos_token_ids
        self._k = request.logprobs
        self._prompt = request.token_ids
        self._top = request.prompt_logprobs
        self._open = request.sampling.n
        self._held: Output | None = None
        """The last output: how much was cached is told after it."""
        self._rest = b""

    @property
    def unfinished(self) -> bool:
        """A choice has not ended."""
        return self._open > 0

    def events(self, data: bytes) -> Sequence[Output]:
        """Of a part of an event stream. :raises DynamoError: the server gave the request up."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST:
            raise EngineFailed(f"the server's answer has an event of more than {_LONGEST >> 20} MB")
        outputs: dict[int, Output] = {}
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # empty, or a comment that keeps the connection alive
            event = line[5:].strip()
            if event == b"[DONE]":
                return self.end(outputs)
            self._take(event, outputs)
        return self._ready(outputs)

    def whole(self, body: bytes) -> Sequence[Output]:
        """Of an answer that is no stream. :raises DynamoError: the server gave the request up."""
        outputs: dict[int, Output] = {}
        self._take(body, outputs)
        return self.end(outputs)

    def _take(self, event: bytes, outputs: dict[int, Output]) -> None:
        try:
            chunk = _decode(event)
        except _NONSENSE as e:
            raise EngineFailed(f"the server's answer is not understood: {e}") from e
        if chunk.error is not None:
            raise refusal(0, event)
        for choice in chunk.choices:
            tokens, reason = choice.token_ids, choice.finish_reason
            if not tokens and reason is None:
                continue
            if (output := outputs.get(choice.index)) is None:
                output = outputs[choice.index] = Output(tokens or [], choice.index)
            elif tokens:
                output.token_ids += tokens
            if self._k is not None and choice.logprobs is not None and tokens:
                output.logprobs = [*(output.logprobs or ()), *_positions(tokens, choice.logprobs, self._k)]
            if choice.prompt_logprobs is not None and self._top is not None and choice.index == 0:
                output.prompt_logprobs = _of_prompt(self._prompt, choice.prompt_logprobs, self._top)
            if reason is not None:
                self._finish(output, reason, choice.stop_reason)
        if chunk.usage is not None and chunk.usage.prompt_tokens_details is not None:
            last = self._held or next((o for o in reversed(outputs.values()) if o.finish_reason is not None), None)
            if last is not None:
                last.cached_tokens = chunk.usage.prompt_tokens_details.cached_tokens

    def _finish(self, output: Output, reason: str, stop_reason: int | str | None) -> None:
        if reason == "abort":
            raise EngineDead("the server aborted the request")
        if reason not in ("stop", "length", "repetition"):
            raise EngineFailed(f"the server ended the request for a reason that is not known here: {reason}")
        self._open -= 1
        output.finish_reason = "length" if reason == "length" else "stop"
        if isinstance(stop_reason, int) and stop_reason not in self._ends:
            output.stop_reason = stop_reason

    def _ready(self, outputs: dict[int, Output]) -> Sequence[Output]:
        """All but the very last one, until nothing can be added to it."""
        if self._open > 0 or self._held is not None or self.over:
            return [*outputs.values()]
        last = next(index for index, output in reversed(outputs.items()) if output.finish_reason is not None)
        self._held = outputs.pop(last)
        return [*outputs.values()]

    def end(self, outputs: dict[int, Output]) -> Sequence[Output]:
        """What is left when nothing more is to come. :raises EngineFailed: a choice has not ended."""
        if self.unfinished:
            raise EngineFailed("the server ended its answer without a finish reason")
        self.over = True
        found = [*outputs.values()]
        if self._held is not None:
            found.append(self._held)
            self._held = None
        return found


def _positions(tokens: Sequence[int], found: _Logprobs, k: int) -> list[TokenLogprob]:
    """:raises EngineFailed: the server does not write tokens as ids."""
    try:
        top = found.top_logprobs or [None] * len(tokens)
        return [TokenLogprob(token, logprob or 0.0, _best(best, k)) for token, logprob, best in zip(tokens, found.token_logprobs, top, strict=True)]
    except ValueError as e:
        raise EngineFailed(f"the server's logprobs are not understood: {e}") from e


def _best(found: dict[str, float] | None, k: int) -> list[tuple[int, float]]:
    """The server lists the token itself and the k best, of which it may be one."""
    if not k or not found:
        return []
    pairs = [(int(name.removeprefix(_TOKEN)), logprob) for name, logprob in found.items()]
    return sorted(pairs, key=lambda pair: -pair[1])[:k]


def _of_prompt(prompt: Sequence[int], found: Sequence[dict[str, _PromptLogprob] | None], k: int) -> list[TokenLogprob | None]:
    positions: list[TokenLogprob | None] = []
    for token, entries in zip(prompt, found, strict=False):
        if entries is None:
            positions.append(None)
            continue
        best = sorted((entry.rank or 0, int(other), entry.logprob) for other, entry in entries.items() if (entry.rank or 0) <= k)
        positions.append(TokenLogprob(token, entries[str(token)].logprob, [(other, logprob) for _, other, logprob in best[:k]]))
    return positions


# ------------------------------------------------------------------ what is not an answer


def refusal(status: int, body: bytes) -> DynamoError:
    """The error that the server meant. :param status: of the response; 0: the body says it."""
    said, code, param = _said(body)
    status = status or code
    said = said[:500]
    if status in (400, 413, 422):
        return RequestError(said, param=param)
    if status == 404:
        return EngineDead(f"the server does not serve this model: {said}")
    if status in (401, 403):
        return EngineDead(f"the server refuses the api_key of this worker: {said}")
    if status in (408, 429, 503, 529):
        return WorkerOverloaded(f"the server is at capacity: {said}")
    if status in (502, 504) or _DEAD.search(said):
        return EngineDead(f"the server's engine is dead: {said}")
    return EngineFailed(f"the server failed this request ({status}): {said}")


def _said(body: bytes) -> tuple[str, int, str | None]:
    """Message, code and parameter of an error in OpenAI's shape, or in any other."""
    try:
        found: Any = msgspec.json.decode(body)
    except _NONSENSE:
        return body.decode("utf-8", "replace").strip() or "no reason given", 0, None
    error: Any = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(error, dict):
        return str(error), 0, None
    said = error.get("message") or error.get("detail") or error.get("type") or "no reason given"
    code, param = error.get("code"), error.get("param")
    return str(said), code if isinstance(code, int) else 0, param if isinstance(param, str) else None
