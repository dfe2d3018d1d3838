"""The last decisions of a process, found by decision id or by request id, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from dynamo_core.routing.record import Decision

CELLS = 2_000_000
"""Values that one ring keeps, over all its records. A value costs at most 32 bytes, so that a ring stays below 64 MiB whatever
the size of the fleet: 3,000 to 4,096 decisions over 64 workers, 200 to 300 over 1,024 (about 35 MiB measured, in each case)."""


class Ring:
    def __init__(self, limit: int = 4096, cells: int = CELLS) -> None:
        self.limit = limit
        self.cells = cells
        self._order: deque[tuple[Decision, int]] = deque()
        self._by_id: dict[str, Decision] = {}
        self._by_request: dict[str, Decision] = {}
        self._held = 0
        self._last: set[int] = set()
        """Identities of the columns of the newest record, which are alive as long as it is."""

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Decision]:
        """Oldest first."""
        return (decision for decision, _ in self._order)

    def __reversed__(self) -> Iterator[Decision]:
        """Newest first."""
        return (decision for decision, _ in reversed(self._order))

    def get(self, key: str) -> Decision | None:
        """By decision id, or the latest decision of the request with this id."""
        return self._by_id.get(key) or self._by_request.get(key)

    def push(self, decision: Decision) -> None:
        if not self.limit:
            return
        cost = self._cost(decision)
        self._order.append((decision, cost))
        self._by_id[decision.id] = decision
        self._by_request[decision.request.id] = decision
        self._held += cost
        while len(self._order) > self.limit or (self._held > self.cells and len(self._order) > 1):
            oldest, freed = self._order.popleft()
            self._held -= freed
            del self._by_id[oldest.id]
            if self._by_request.get(oldest.request.id) is oldest:
                del self._by_request[oldest.request.id]

    def _cost(self, decision: Decision) -> int:
        """Values that this record adds: a column that it shares with the one before costs nothing."""
        columns = set(map(id, decision.columns.values()))
        rows, fresh = len(decision.workers), len(columns - self._last)
        self._last = columns
        return rows * fresh + len(decision.totals) * (len(decision.scores) + 1) + len(decision.rejected) * 4
