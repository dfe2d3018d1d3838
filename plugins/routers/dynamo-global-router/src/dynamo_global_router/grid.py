"""Strategy `grid`: the pool stands in a table, by prompt length and latency targets. Nothing of the pools' state enters but whether they can serve."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from attrs import validators as v

from dynamo_core.cards import Role
from dynamo_core.errors import ConfigError, Problem
from dynamo_global_router.contract import Choice, PoolFacts, PoolName, PoolRequest

Cells = str | Sequence["Cells"]
AXES: dict[Role, tuple[tuple[str, ...], ...]] = {
    "prefill": (("input", "ttft_ms"),), "decode": (("input", "itl_ms"),), "aggregated": (("ttft_ms", "itl_ms"), ("input", "ttft_ms", "itl_ms")),
}
"""By role, what tables may be looked up by; from the outermost dimension inwards."""


@attrs.frozen
class Axis:
    """A range in equal steps. What lies outside counts as the nearest step."""

    min: float
    """Where the first step begins."""
    max: float
    """Where the last step ends."""
    steps: int = attrs.field(validator=v.ge(1))
    """How many."""

    def __attrs_post_init__(self) -> None:
        if self.max <= self.min:
            raise ValueError(f"max must be above min, which is {self.min:g}: {self.max:g}")

    def index(self, value: float | None) -> int:
        """Which step a value is in; `None` is in the middle."""
        if value is None:
            value = (self.min + self.max) / 2
        return min(self.steps - 1, max(0, int((value - self.min) / ((self.max - self.min) / self.steps))))


@attrs.frozen
class Override:
    """Requests of these priorities go to one pool, whatever the table says."""

    pool: str
    """Its name."""
    min_priority: int = -(2**31)
    """The lowest priority that this is for ..."""
    max_priority: int = 2**31 - 1
    """... and the highest."""


@attrs.define
class Grid:
    """Looks the pool up: for prefill by `input` and `ttft_ms`, for decode by `input` and `itl_ms`, otherwise by `ttft_ms`, `itl_ms` and perhaps `input`."""

    table: tuple[tuple[str, ...], ...] | tuple[tuple[tuple[str, ...], ...], ...] = attrs.field()
    """Names of pools: a row for each step of the first axis (of `input`, `ttft_ms`, `itl_ms`, those that are there), in it a column for each of the next."""
    input: Axis | None = None
    """Prompt tokens."""
    ttft_ms: Axis | None = None
    """The target for the time to the first token."""
    itl_ms: Axis | None = None
    """The target for the time between tokens."""
    overrides: tuple[Override, ...] = ()
    """The first that fits wins over the table."""
    retry: bool = True
    """When the pool fails before the first output, try faster ones."""
    _pools: dict[str, PoolName] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """Those that are there, from the outermost dimension of the table inwards."""
        return tuple(name for name in ("input", "ttft_ms", "itl_ms") if getattr(self, name) is not None)

    def bind(self, pools: Sequence[PoolName], role: Role) -> None:
        problems = [*self._shape(role)]
        known = [pool.name for pool in pools]
        strangers = sorted({*_names(self.table), *(override.pool for override in self.overrides)} - {*known})
        problems += [f"names the pool {name!r}, which is not among the pools: {', '.join(known)}" for name in strangers]
        if problems:
            raise ConfigError(*(Problem(f"pool strategy 'grid' {what}") for what in problems))
        self._pools = {pool.name: pool for pool in pools}

    def _shape(self, role: Role) -> Sequence[str]:
        allowed = AXES.get(role, ())
        if self.axes not in allowed:
            wanted = " or ".join(", ".join(axes) for axes in allowed)
            return [f"of a router of role {role!r} needs the axes {wanted}; it has {', '.join(self.axes) or 'none'}"]
        found: list[str] = []
        _check(self.table, [(name, getattr(self, name).steps) for name in self.axes], "table", found)
        return found

    def choose(self, request: PoolRequest, pools: Sequence[PoolFacts]) -> Choice:
        name, kind, why = self._wanted(request)
        wanted = self._pools[name]
        rows = sorted(range(len(pools)), key=lambda row: (pools[row].rank, pools[row].name))
        faster = [row for row in reversed(rows) if (pools[row].rank, pools[row].name) < (wanted.rank, name)]
        slower = [row for row in rows if (pools[row].rank, pools[row].name) > (wanted.rank, name)]
        chosen = [row for row in rows if pools[row].name == name]
        if not chosen:
            # Nobody is turned away because of a table: the nearest faster pool, and slower ones only when no faster one is there.
            order = faster or slower
            return Choice(order if self.retry else order[:1], "substitute", f"{why} is {name}, which cannot take it; {pools[order[0]].name} stands in")
        return Choice([*chosen, *faster] if self.retry else chosen, kind, why)

    def _wanted(self, request: PoolRequest) -> tuple[str, str, str]:
        for override in self.overrides:
            if override.min_priority <= request.priority <= override.max_priority:
                return override.pool, "override", f"the pool for priority {request.priority}"
        values = {"input": float(request.input_tokens), "ttft_ms": request.ttft_target_ms, "itl_ms": request.itl_target_ms}
        cell: Cells = self.table
        steps: list[str] = []
        for name in self.axes:
            axis: Axis = getattr(self, name)
            step = axis.index(values[name])
            steps.append(f"{name} {step + 1}/{axis.steps}" + (" (nobody said)" if values[name] is None else ""))
            cell = cell[step]
        assert isinstance(cell, str), "bind has looked at the shape"
        return cell, "grid", f"the table's pool for {', '.join(steps)}"


def _names(cells: Cells) -> set[str]:
    return {cells} if isinstance(cells, str) else {name for cell in cells for name in _names(cell)}


def _check(cells: Cells, axes: Sequence[tuple[str, int]], at: str, found: list[str]) -> None:
    if not axes:
        if not isinstance(cells, str):
            found.append(f"has one dimension too many: {at} must be the name of a pool")
        return
    (name, steps), rest = axes[0], axes[1:]
    if isinstance(cells, str):
        found.append(f"has one dimension too few: {at} must be an array, one entry for each step of {name}")
    elif len(cells) != steps:
        found.append(f"has {len(cells)} entries in {at}, and {steps} steps of {name}")
    else:
        for i, cell in enumerate(cells):
            _check(cell, rest, f"{at}[{i}]", found)
