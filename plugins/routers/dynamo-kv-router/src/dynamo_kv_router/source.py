"""What one worker says of its cache, put in order: nothing twice, nothing missing, and how to ask for what was lost. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import attrs

from dynamo_core.kv import Change, Hasher, News
from dynamo_core.kv.wire import Ask, unpack
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Instance

WAITING = 1024
"""News that wait for an answer, at most. What falls out is missed again, and asked for again."""


@attrs.define(eq=False)
class Source:
    worker: Worker
    instance: Instance
    publishes: bool
    """Its card promises events."""
    heard: float = -math.inf
    """When it last said something, by the router's clock."""
    since: float = 0.0
    """When it was expected to speak first."""
    stream: int = 0
    last: int = 0
    whole: bool = False
    """The index has its picture up to `last`."""
    asking: bool = False
    waiting: deque[News] = attrs.field(factory=lambda: deque[News](maxlen=WAITING))
    reported: str = ""
    """What it says is wrong with itself."""
    refused: str = ""
    """Why its news cannot be used."""
    unanswered: str = ""
    """Why it could not be asked."""
    degraded: bool = False
    """As of the last look; while it lasts, the index is not used for it."""
    gaps: int = 0

    def problem(self, now: float, silence: float) -> str:
        """What is wrong with its knowledge, or empty. :param silence: seconds without a sign of life that are too many."""
        if not self.publishes:
            return ""
        if found := self.reported or self.refused or self.unanswered:
            return found
        quiet = now - max(self.heard, self.since)
        return f"it is to publish KV events and has been silent for {silence:g} s" if quiet > silence else ""

    def take(self, news: News, now: float, hasher: Hasher) -> Sequence[Change]:
        """The changes to make now. When `lost` is true afterwards, something has to be asked for first, and the news wait.

        :raises ValueError: they hold something that this version does not know.
        """
        self.heard, self.reported = now, news.problem
        self.refused = ""
        if news.secret != hasher.fingerprint:
            self.refused = "it names its blocks with another secret than this router; set [kv] secret for both, or start it again"
        elif news.block_size != hasher.block_size:
            self.refused = f"it has blocks of {news.block_size} tokens, and the model's card says {hasher.block_size}"
        if self.refused:
            return ()
        if news.changes:
            if self.asking or not self._next(news):
                self.waiting.append(news)
                return ()
            changes = unpack(news.changes)
            self.last = news.id
            return changes
        if news.stream != self.stream or news.id > self.last:
            self.waiting.append(news)
        return ()

    def _next(self, news: News) -> bool:
        return self.whole and news.stream == self.stream and news.id == self.last + 1

    @property
    def lost(self) -> bool:
        """Something is missing that its worker can say again."""
        while self.waiting and self.whole and self.waiting[0].stream == self.stream and self.waiting[0].id <= self.last:
            self.waiting.popleft()
        return not self.whole or bool(self.waiting)

    def ask(self) -> Ask:
        return Ask(self.stream, self.worker.dp_rank, self.last if self.whole else 0)

    def answered(self, news: Sequence[News]) -> tuple[bool, list[Change]]:
        """Whether to forget everything before, and the changes to make.

        :raises ValueError: this is not an answer to what was asked.
        """
        if not news:
            raise ValueError("the answer is empty")
        first = news[0]
        if not first.whole and (first.stream != self.stream or first.id != self.last + 1):
            raise ValueError(f"asked for what follows {self.last}, it answered {first.id}")
        changes = [change for part in news for change in unpack(part.changes)]
        self.whole = True
        self.stream, self.last = first.stream, news[-1].id
        self.unanswered = ""
        return first.whole, changes

    def resumed(self) -> list[Change]:
        """What waited and follows without a gap. The rest waits on, if it is news at all."""
        changes: list[Change] = []
        while self.waiting:
            if self._next(self.waiting[0]) and self.waiting[0].changes:
                news = self.waiting.popleft()
                changes += unpack(news.changes)
                self.last = news.id
            elif self.waiting[0].stream == self.stream and self.waiting[0].id <= self.last:
                self.waiting.popleft()
            else:
                break
        return changes

    def forget(self) -> None:
        """Its picture is not used any more; it has to be fetched anew."""
        self.whole = False
        self.waiting.clear()
