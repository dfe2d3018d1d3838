"""A worker that writes down what an engine tells it, and the requests that tests ask with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import attrs

from dynamo_core.cards import ModelCard
from dynamo_core.context import Context
from dynamo_core.engines import EngineContext, KvEvent
from dynamo_core.types import Load, Output, Request, Sampling, Stops

PROMPT = list(b"Hello, world! How are you?" * 3)


@attrs.define
class Worker:
    """What the engine's worker hears."""

    offers: list[list[ModelCard]] = attrs.field(factory=list)
    events: list[KvEvent] = attrs.field(factory=list)
    loads: list[Load] = attrs.field(factory=list)
    phases: list[str] = attrs.field(factory=list)
    deaths: list[str] = attrs.field(factory=list)

    @property
    def context(self) -> EngineContext:
        return EngineContext(offer=lambda cards: self.offers.append(list(cards)), kv_events=lambda events, rank: self.events.extend(events), load=self.loads.append,
                             progress=lambda phase, fraction: self.phases.append(phase), died=self.deaths.append)  # fmt: skip


def request(tokens: int = 5, prompt: list[int] | None = None, **more: Any) -> Request:
    more = {"sampling": Sampling(temperature=0.0), "stops": Stops(max_tokens=tokens, ignore_eos=True), **more}
    return Request(id="r", model="m", token_ids=prompt or PROMPT, **more)


async def ask(engine: Any, asked: Request) -> list[Output]:
    async with asyncio.timeout(20):
        return [output async for output in engine.generate(asked, Context(asked.id, traceparent="00-aa-bb-01"))]


async def until(condition: Callable[[], Any], what: str) -> None:
    try:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never {what}") from None
