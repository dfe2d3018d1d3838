"""Writes decisions to a file as JSON lines, in bounded space, off the request path. No prompt is in them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO

from dynamo_core.routing.record import Decision

log = logging.getLogger(__name__)

_BACKLOG = 4096
"""Decisions that may wait to be written; more are dropped, and counted."""
_EVERY = 1.0
"""Seconds between two looks at what can be written."""


class Recorder:
    """`path` is the newest file, `path.1` ... the older ones. A decision is written once its outcome is known, or is not to be waited for any longer."""

    def __init__(self, path: Path, *, max_bytes: int = 64 * 2**20, files: int = 2, lag: int = 256, patience: float = 30.0) -> None:
        """:param max_bytes: of one file. :param files: how many to keep.

        :param lag: decisions that may wait for their outcome. :param patience: seconds for which they do.
        """
        self.path = path
        self.dropped = 0
        self._max_bytes = max_bytes
        self._files = max(1, files)
        self._lag = lag
        self._patience = patience
        self._held: deque[Decision] = deque()
        """Appended to by the event loop, emptied by the thread."""
        self._open: list[Decision] = []
        """Of the thread: those whose outcome is still to come."""
        self._due = threading.Event()
        self._closing = False
        self._problem = ""
        self._file: IO[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="decision recorder", daemon=True)
        self._thread.start()

    def record(self, decision: Decision) -> None:
        """Keep it to be written. Costs one append."""
        held = self._held
        if len(held) >= _BACKLOG:
            self.dropped += 1
            return
        held.append(decision)
        if len(held) > 2 * self._lag and not self._due.is_set():
            self._due.set()

    def close(self) -> None:
        """Write what is left."""
        self._closing = True
        self._due.set()
        self._thread.join(timeout=10.0)

    def problem(self) -> str:
        """What keeps decisions from being written; empty when nothing does."""
        return self._problem

    def _run(self) -> None:
        while not self._closing:
            self._due.wait(_EVERY)
            self._due.clear()
            self._write(self._ready())
        self._write([*self._open, *self._held])
        if self._file is not None:
            self._file.close()

    def _ready(self) -> list[Decision]:
        """Those that are settled, whatever is still open before them, and the oldest of those that are not, where they are too many or too old."""
        while self._held:
            self._open.append(self._held.popleft())
        late = time.time() - self._patience
        ready, still = list[Decision](), list[Decision]()
        for decision in self._open:
            (ready if _is_settled(decision) or decision.time < late else still).append(decision)
        over = max(0, len(still) - self._lag)
        self._open = still[over:]
        return [*still[:over], *ready]

    def _write(self, batch: list[Decision]) -> None:
        if not batch:
            return
        lines = [line for decision in batch if (line := self._line(decision))]
        try:
            for line in lines:
                if self._file is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self.path.open("ab")
                self._file.write(line)
                if self._file.tell() >= self._max_bytes:
                    self._file.close()
                    self._file = None
                    self._rotate()
            if self._file is not None:
                self._file.flush()
            self._problem = ""
        except OSError as e:
            if not self._problem:
                log.error("decisions cannot be recorded: %s", e)
            self._problem = f"decisions cannot be recorded: {e}"
            self.dropped += len(lines)
            self._file = None

    def _line(self, decision: Decision) -> bytes:
        """Empty for a record that is no JSON, because of what a caller or a plugin put into it; others go on."""
        try:
            return decision.to_json().encode() + b"\n"
        except Exception as e:
            if not self.dropped:
                log.warning("decision %s cannot be recorded; others like it are counted and not logged: %s: %s", decision.id, type(e).__name__, e)
            self.dropped += 1
            return b""

    def _rotate(self) -> None:
        for i in range(self._files - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{i}")
            newer = self.path if i == 1 else self.path.with_name(f"{self.path.name}.{i - 1}")
            if newer.exists():
                newer.replace(older)
        if self._files == 1:
            self.path.unlink(missing_ok=True)


def _is_settled(decision: Decision) -> bool:
    """Nothing will be added to it."""
    return bool(decision.outcome) or decision.worker is None or decision.dry_run
