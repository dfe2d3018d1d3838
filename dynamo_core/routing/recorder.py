"""Writes decisions to a file as JSON lines, in bounded space, off the request path. No prompt is in them."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path
from typing import IO

from dynamo_core.routing.record import Decision

log = logging.getLogger(__name__)

_BACKLOG = 4096
"""Decisions that may wait to be written; more are dropped, and counted."""


class Recorder:
    """`path` is the newest file, `path.1` ... the older ones. A decision is written some time after it was made, so that its outcome is mostly in it."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, files: int = 2, lag: int = 256) -> None:
        """:param max_bytes: of one file. :param files: how many to keep. :param lag: decisions that are held back until their outcome is known."""
        self.path = path
        self.dropped = 0
        self._max_bytes = max_bytes
        self._files = max(1, files)
        self._lag = lag
        self._held: list[Decision] = []
        self._queue: queue.Queue[list[Decision] | None] = queue.Queue()
        self._waiting = 0
        self._problem = ""
        self._thread = threading.Thread(target=self._write, name="decision recorder", daemon=True)
        self._thread.start()

    def record(self, decision: Decision) -> None:
        """Keep it to be written. Costs one append."""
        self._held.append(decision)
        if len(self._held) >= 2 * self._lag:
            self._hand_over(self._lag)

    def close(self) -> None:
        """Write what is left."""
        self._hand_over(0)
        self._queue.put(None)
        self._thread.join(timeout=10.0)

    def problem(self) -> str:
        """What keeps decisions from being written; empty when nothing does."""
        return self._problem

    def _hand_over(self, keep: int) -> None:
        count = len(self._held) - keep
        batch, self._held = self._held[:count], self._held[count:]
        if self._queue.qsize() * self._lag > _BACKLOG:
            self.dropped += len(batch)
        else:
            self._queue.put(batch)

    def _write(self) -> None:
        file: IO[bytes] | None = None
        while (batch := self._queue.get()) is not None:
            try:
                for decision in batch:
                    if file is None:
                        self.path.parent.mkdir(parents=True, exist_ok=True)
                        file = self.path.open("ab")
                    file.write(decision.to_json().encode() + b"\n")
                    if file.tell() >= self._max_bytes:
                        file.close()
                        file = None
                        self._rotate()
                if file is not None:
                    file.flush()
                self._problem = ""
            except OSError as e:
                if not self._problem:
                    log.error("decisions cannot be recorded: %s", e)
                self._problem = f"decisions cannot be recorded: {e}"
                self.dropped += len(batch)
                file = None
        if file is not None:
            file.close()

    def _rotate(self) -> None:
        for i in range(self._files - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{i}")
            newer = self.path if i == 1 else self.path.with_name(f"{self.path.name}.{i - 1}")
            if newer.exists():
                newer.replace(older)
        if self._files == 1:
            self.path.unlink(missing_ok=True)
