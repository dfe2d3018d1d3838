"""Decisions in the discovery store, for somebody else to act on: what the connector `virtual` writes, and what the other side reads and answers.

    async with discovery:
        decisions = Decisions(discovery, "dynamo")
        async for decision in decisions.follow():
            ...                                  # make it decision.targets
            await decisions.done(decision)       # or: await decisions.refuse(decision, "no quota left")

    v1/planner/<namespace>/<name>/decision       the last Decision
    v1/planner/<namespace>/<name>/answer         the Answer to it, or to an earlier one
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec

from dynamo_core.discovery.contract import Discovery, Put


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas of each role there shall be, all roles that were ever decided about."""

    id: int
    """Counts from 1."""
    targets: dict[str, int]
    reason: str = ""
    """One line for people."""
    time: float = 0.0
    """Unix time."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What whoever acts says of a decision."""

    id: int
    """Of the decision."""
    refused: str | None = None
    """Why it will not be; `None`: it was taken."""
    time: float = 0.0
    """Unix time."""


class Decisions:
    """Both sides of it. Calls raise `StoreUnavailable` while the store is away."""

    def __init__(self, discovery: Discovery, namespace: str, name: str = "planner") -> None:
        self._discovery = discovery
        self._prefix = f"v1/planner/{namespace}/{name}/"
        self._decision = msgspec.json.Decoder(Decision)
        self._answer = msgspec.json.Decoder(Answer)

    async def last(self) -> Decision | None:
        value = await self._discovery.get(f"{self._prefix}decision")
        return None if value is None else self._decision.decode(value)

    async def answer(self) -> Answer | None:
        value = await self._discovery.get(f"{self._prefix}answer")
        return None if value is None else self._answer.decode(value)

    async def decide(self, decision: Decision) -> None:
        await self._discovery.put(f"{self._prefix}decision", msgspec.json.encode(decision))

    # -------------------------------------------------------------- whoever acts

    async def follow(self) -> AsyncGenerator[Decision]:
        """The last decision, then each later one. Decisions that follow each other quickly may be skipped: only the last one counts."""
        told = 0
        async with self._discovery.watch(f"{self._prefix}decision") as changes:
            async for change in changes:
                if isinstance(change, Put):
                    decision = self._decision.decode(change.value)
                    if decision.id != told:
                        told = decision.id
                        yield decision

    async def done(self, decision: Decision) -> None:
        """Say that the decision was taken; replicas may still come and go."""
        await self._say(Answer(id=decision.id, time=time.time()))

    async def refuse(self, decision: Decision, why: str) -> None:
        """Say that it will not be, and why, in a sentence for the planner's log."""
        await self._say(Answer(id=decision.id, refused=why, time=time.time()))

    async def _say(self, answer: Answer) -> None:
        await self._discovery.put(f"{self._prefix}answer", msgspec.json.encode(answer))

    # -------------------------------------------------------------- whoever decides

    async def answered(self, decision: Decision, timeout: float) -> Answer | None:
        """The answer to this decision, or `None` when there is none within `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._discovery.watch(f"{self._prefix}answer") as changes:
                async for change in changes:
                    if isinstance(change, Put) and (answer := self._answer.decode(change.value)).id == decision.id:
                        return answer
        return None
