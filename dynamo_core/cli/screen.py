"""What `dynamo up` and `dynamo demo` show while they work: one status line on a terminal, plain lines elsewhere, and a heartbeat."""

from __future__ import annotations

import asyncio
import time
from typing import TextIO

from rich.console import Console
from rich.text import Text

HEARTBEAT = 5.0
"""Seconds of silence after which the current state is said again."""


class Screen:
    """Lines of children, prefixed; progress sentences; and a sign of life when nothing else is said."""

    def __init__(self, stream: TextIO, *, verbose: bool) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self._verbose = verbose
        self._started = time.monotonic()
        self._sentence = ""
        self._heartbeat: asyncio.Task[None] | None = None
        self.tail: list[str] = []
        """The last lines of children, for when something goes wrong."""

    def line(self, name: str, line: str) -> None:
        """A line that a child printed."""
        self.tail.append(f"{name} | {line}")
        del self.tail[:-40]
        if self._verbose:
            self.console.print(Text.assemble((f"{name:<12} ", "cyan"), line))

    def say_tail(self) -> None:
        """What the children said last, when it was not shown."""
        for line in self.tail:
            self.say(line)

    def say(self, line: str) -> None:
        self._sentence = ""
        self.console.print(Text(line))

    def progress(self, sentence: str) -> None:
        self._sentence = sentence
        self.console.print(Text(f"{time.monotonic() - self._started:6.1f} s  {sentence}", style="dim"))
        if self._heartbeat is None:
            self._heartbeat = asyncio.create_task(self._beat(), name="heartbeat")

    async def _beat(self) -> None:
        while True:
            said = self._sentence
            await asyncio.sleep(HEARTBEAT)
            if said and said == self._sentence:
                self.console.print(Text(f"{time.monotonic() - self._started:6.1f} s  still: {said}", style="dim"))
