"""What is kept of each decision: everything that it was made of, in a bounded ring and a JSONL file."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigError, Problem
from dynamo_core.scaling import RoleState
from dynamo_planner.contract import Expected, Load, Outlook, Proposal

log = logging.getLogger(__name__)


class LoadSeen(msgspec.Struct, frozen=True, omit_defaults=True):
    at: float
    seconds: float
    rate: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    cached_share: float = 0.0
    in_progress: float = 0.0
    held: float = 0.0
    ttft: float | None = None
    itl: float | None = None
    prompt_spread: float = 0.0

    @classmethod
    def of(cls, load: Load | None) -> LoadSeen | None:
        return None if load is None else cls(*(getattr(load, name) for name in cls.__struct_fields__))

    def load(self) -> Load:
        return Load(*(getattr(self, name) for name in self.__struct_fields__))


class RoleSeen(msgspec.Struct, frozen=True):
    desired: int
    ready: int
    starting: int
    draining: int
    gpus_per_replica: int
    stable: bool
    reducible: int = 0

    @classmethod
    def of(cls, state: RoleState) -> RoleSeen:
        return cls(*(getattr(state, name) for name in cls.__struct_fields__))

    def state(self) -> RoleState:
        return RoleState(*(getattr(self, name) for name in self.__struct_fields__))


class ForecastSeen(msgspec.Struct, frozen=True):
    """Each as (mean, low, high)."""

    by: str
    horizon: float
    rate: tuple[float, float, float]
    prompt_tokens: tuple[float, float, float]
    output_tokens: tuple[float, float, float]

    @classmethod
    def of(cls, outlook: Outlook | None) -> ForecastSeen | None:
        if outlook is None:
            return None

        def three(expected: Expected) -> tuple[float, float, float]:
            return expected.mean, expected.low, expected.high

        return cls(outlook.by, outlook.horizon, three(outlook.rate), three(outlook.prompt_tokens), three(outlook.output_tokens))


class ProposalSaid(msgspec.Struct, frozen=True):
    by: str
    kind: str
    targets: dict[str, int]
    why: dict[str, str]

    @classmethod
    def of(cls, proposal: Proposal) -> ProposalSaid:
        return cls(proposal.by, proposal.kind, dict(proposal.targets), dict(proposal.why))


class ConstraintSaid(msgspec.Struct, frozen=True):
    by: str
    role: str
    before: int
    after: int
    why: str


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One decision and what came of it."""

    number: int = 0
    at: float
    interval: LoadSeen | None = None
    """The interval of the history that ended with this decision, if one did. These make the history of `what-if`."""
    load: LoadSeen | None = None
    missing: tuple[str, ...] = ()
    fleet: dict[str, RoleSeen] = {}
    performance: str = ""
    forecast: ForecastSeen | None = None
    proposals: list[ProposalSaid] = []
    silent: str = ""
    """Why a stage proposed nothing."""
    wanted: dict[str, int] = {}
    """After `reconcile`."""
    constraints: list[ConstraintSaid] = []
    targets: dict[str, int] = {}
    gpus: int = 0
    cold_start: float = 0.0
    action: str = "kept"
    """`kept`, `scaled`, `dry-run`, `refused`, `unavailable`, `skipped` (something was missing) or `failed` (a stage broke)."""
    result: str = ""
    stuck: list[str] = []
    seconds: float = 0.0
    """That the decision and its execution took."""

    def won(self, role: str) -> ConstraintSaid | None:
        """The constraint that had the last word on this role, if any had."""
        return next((said for said in reversed(self.constraints) if said.role == role), None)


class Ring:
    """The last decisions, by number."""

    def __init__(self, size: int) -> None:
        self._kept: deque[Decision] = deque(maxlen=size)

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, number: int | None = None) -> Decision | None:
        """By number; without one, the last."""
        if number is None:
            return self._kept[-1] if self._kept else None
        return next((decision for decision in self._kept if decision.number == number), None)


class Journal:
    """A JSONL file of decisions. When it is full it is put aside as `.1`, and the one before that is gone.

    A disk that fails costs the record, never the decision.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit, self._broken = path, limit, False
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and (size := path.stat().st_size):
            with path.open("r+b") as file:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a crash has cut the last line; what comes now must not be part of it
                    file.write(b"\n")

    def add(self, decision: Decision) -> None:
        line = msgspec.json.encode(decision) + b"\n"
        try:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._limit:
                self._path.replace(self._path.with_name(self._path.name + ".1"))
            with self._path.open("ab") as file:
                file.write(line)
            self._broken = False
        except OSError as e:
            if not self._broken:
                log.warning("decisions are not written to %s any more: %s", self._path, e.strerror or e)
            self._broken = True


def read_journal(path: Path) -> list[Decision]:
    """All decisions of a journal, what was put aside included; lines that a crash has cut are left out.

    :raises ConfigError: there is no such file, or it is something else.
    """
    decoder = msgspec.json.Decoder(Decision)
    found: list[Decision] = []
    aside = path.with_name(path.name + ".1")
    for file in (aside, path):
        try:
            lines = [line for line in file.read_bytes().split(b"\n") if line]
        except OSError as e:
            if file is aside:
                continue
            raise ConfigError(Problem(f"the journal of the planner cannot be read: {e.strerror}", str(path), remedy="`dynamo planner run` writes it")) from e
        before = len(found)
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):
                found.append(decoder.decode(line))
        if len(lines) > 1 and len(found) == before:
            raise ConfigError(Problem("no line of it is a decision of the planner", str(file)))
    return found
