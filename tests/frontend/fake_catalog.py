"""A catalog in memory whose models play scripts: deltas, pauses and errors. For tests of the HTTP surface alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.errors import ModelNotFound, Unavailable
from dynamo_core.preprocess.limits import check_token_ids
from dynamo_core.types import Delta, LogprobText, Request, TextOptions, Usage

ALL = ("logprobs", "prompt_logprobs", "guided", "logit_bias", "n")

Step = Sequence[Delta] | Delta | Exception | float | asyncio.Event
"""What one read brings; a number is a pause in seconds and an event is waited for, before the next step."""


def logprob(token: str, token_id: int = 1, value: float = -0.5) -> LogprobText:
    return LogprobText(token, token_id, value, list(token.encode()), [LogprobText(token, token_id, value, list(token.encode()))])


def words(*texts: str, index: int = 0, finish: str = "stop") -> list[Step]:
    """One token a read, then the finish reason in a read of its own."""
    return [*(Delta(index=index, text=text, token_ids=[position]) for position, text in enumerate(texts)), Delta(index=index, finish_reason=finish)]  # type: ignore[arg-type]


class FakePreprocessor:
    def __init__(self) -> None:
        self.rendered: list[dict[str, Any]] = []

    async def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        self.rendered.append({"messages": list(messages), **options})
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([1] if add_special_tokens else []) + [256 + (ord(c) % 700) for c in text[:200]]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + t % 26) for t in token_ids)

    def assembler(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def logprob(self, token_id: int, value: float, top: Sequence[tuple[int, float]] = ()) -> LogprobText:
        return logprob(str(token_id), token_id, value)


class FakeGeneration:
    def __init__(self, script: Sequence[Step], request: Request, number: int) -> None:
        self.script = list(script)
        self.request = request
        self.usage = Usage(prompt_tokens=len(request.token_ids), cached_tokens=2)
        self.decisions = [f"d{number}"]
        self.workers = ["backend-000001"]
        self.prompt_logprobs: list[LogprobText | None] | None = None
        if request.prompt_logprobs is not None:
            self.prompt_logprobs = [None, *(logprob(f"p{t}", t) for t in request.token_ids[1:])]
        self.cancelled: str | None = None
        self.cancel_event = asyncio.Event()
        self.reads = 0
        self.ended = False

    async def read(self) -> Sequence[Delta]:
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, (int, float)):
                await asyncio.sleep(step)
                continue
            if isinstance(step, asyncio.Event):
                await step.wait()
                continue
            deltas = [step] if isinstance(step, Delta) else list(step)
            self.reads += 1
            await asyncio.sleep(0)  # as in life: the loop gets its turn between two steps of an engine
            self.usage.completion_tokens += sum(len(d.token_ids) for d in deltas)
            return deltas
        self.ended = True
        return ()

    def cancel(self, reason: str = "client disconnected") -> None:
        if self.cancelled is None:
            self.cancelled = reason
            self.cancel_event.set()


class FakeModel:
    def __init__(self, name: str, script: Callable[[Request], Sequence[Step]] | Sequence[Step] | None = None, **card: Any) -> None:
        card.setdefault("context_length", 1000)
        card.setdefault("capabilities", ALL)
        card.setdefault("vocab_size", 1000)
        self.name = name
        self.card = ModelCard(name=name, **card)
        self.preprocessor = FakePreprocessor()
        self.created = 1_700_000_000
        self.script = script if script is not None else words("Hello", ",", " world")
        self.starts: list[tuple[Request, TextOptions, Context]] = []
        self.generations: list[FakeGeneration] = []
        self.start_error: Exception | None = None
        self.start_delay = 0.0
        self.missing: str | None = None

    def not_ready(self) -> str | None:
        return self.missing

    def lost(self) -> str | None:
        return None

    async def start(self, request: Request, text: TextOptions, context: Context) -> FakeGeneration:
        check_token_ids(self.card, request.token_ids)
        self.starts.append((request, text, context))
        if self.start_delay:
            await asyncio.sleep(self.start_delay)
        if self.start_error is not None:
            raise self.start_error
        script = self.script(request) if callable(self.script) else [_copy(step) for step in self.script]
        generation = FakeGeneration(script, request, len(self.starts))
        self.generations.append(generation)
        return generation

    async def route(self, request: Request, context: Context) -> str:
        return f"dry-{request.id}"


class FakeCatalog:
    def __init__(self, *models: FakeModel) -> None:
        self.by_name = {name: model for model in models for name in (model.name, *model.card.aliases)}
        self.every = list(models)
        self.records: dict[str, dict[str, Any]] = {}
        self.problems: dict[str, str] = {}

    def get(self, name: str) -> FakeModel:
        if name not in self.by_name:
            raise ModelNotFound(f"there is no model {name!r}", param="model")
        model = self.by_name[name]
        if model.missing:
            raise Unavailable(f"model {name!r} is not ready: {model.missing}")
        return model

    def models(self) -> list[FakeModel]:
        return [model for model in self.every if not model.missing]

    def not_ready(self) -> str | None:
        return None if self.models() else "no model is ready: nobody has registered one"

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        return self.records.get(decision_id)

    def status(self) -> dict[str, Any]:
        return {"models": {m.name: {} for m in self.models()}, "instances": [], "problems": self.problems}


def _copy(step: Step) -> Step:
    if isinstance(step, Delta):
        return Delta(step.index, step.text, list(step.token_ids), step.finish_reason, step.stop_reason, step.logprobs)
    return [_copy(s) for s in step] if isinstance(step, (list, tuple)) else step  # type: ignore[misc]
