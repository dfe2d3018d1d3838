"""What one parsed request asks the fleet to do, and how its answer is to be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import msgspec

from dynamo_core.frontend.answers import Answer
from dynamo_core.frontend.chunks import Chunks
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.fields import Annotation, Body, EmbeddingBody, PoolingBody
from dynamo_core.pipeline.contract import Generation, Model
from dynamo_core.types import Delta, Request, TextOptions


@attrs.define
class Job:
    id: str
    """Of the answer: `chatcmpl-...` or `cmpl-...`."""
    body: Body | EmbeddingBody | PoolingBody
    model: Model
    requests: list[Request]
    """One, or one for each prompt of a plain completion."""
    text: TextOptions
    prompts: Sequence[str]
    """As text: for `echo` and the annotation `formatted_prompt`."""
    echo: bool
    annotations: Sequence[Annotation]
    dry_run: bool
    chunks: type[Chunks]
    answer: Callable[[int, Sequence[str]], Answer]
    """Made from the number of choices and what stands before their first text."""
    kept_ids: list[list[int]] = attrs.field(factory=list)
    """Generated token ids by choice, for the annotation `token_ids`."""

    def __attrs_post_init__(self) -> None:
        if "token_ids" in self.annotations:
            self.kept_ids = [[] for _ in range(self.choices)]

    @property
    def choices(self) -> int:
        return len(self.requests) * self.requests[0].sampling.n

    @property
    def longest(self) -> int:
        """Tokens that it uses at most: of all prompts, and of all answers at their full length."""
        return sum(len(r.token_ids) + r.sampling.n * _answer(r) for r in self.requests)

    def salt(self, tenant: str) -> None:
        """Let it share cached KV blocks only with requests of the same tenant, and of the same salt within it."""
        self.requests = [msgspec.structs.replace(r, cache_salt=f"{len(tenant)}:{tenant}:{r.cache_salt or ''}") for r in self.requests]

    def echoes(self) -> list[str]:
        """For each choice, what stands before its first text."""
        n = self.requests[0].sampling.n
        return [prompt for prompt in self.prompts for _ in range(n)] if self.echo else []

    def keep_ids(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self.kept_ids[delta.index] += delta.token_ids

    def report(self, exchange: Exchange, generation: Generation, now: float) -> dict[str, Any] | None:
        """The `dynamo` object of the answer: what the request's annotations asked for, or `None`."""
        if not self.annotations:
            return None
        report: dict[str, Any] = {}
        for name in self.annotations:
            match name:
                case "request_id":
                    report[name] = exchange.request_id
                case "worker":
                    report[name] = list(generation.workers)
                case "decision":
                    report[name] = list(generation.decisions)
                case "timing":
                    report[name] = {
                        "ttft_ms": round((exchange.first_token - exchange.arrived) * 1000, 3),
                        "total_ms": round((now - exchange.arrived) * 1000, 3),
                    }
                case "token_ids":
                    report[name] = self.kept_ids
                case "prompt_token_ids":
                    report[name] = [request.token_ids for request in self.requests]
                case "formatted_prompt":
                    report[name] = list(self.prompts)
        return report


def _answer(request: Request) -> int:
    """Tokens of one answer at its longest, or as the caller expects it."""
    longest = request.stops.max_tokens or 0
    expected = request.hints.expected_output_tokens
    return longest if expected is None else min(longest, expected)
