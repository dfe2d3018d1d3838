"""The configuration as written: plain data, and for each place in it where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from dynamo_core.errors import Problem

Key = tuple[str | int, ...]
"""A place in the configuration: `("router", "scorers", 0, "weight")`."""


@attrs.frozen
class Origin:
    """Where a value was written."""

    kind: Literal["file", "env", "set", "default"]
    where: str
    """`path:line`, `env NAME`, `--set KEY` or `default`."""
    source: str = ""
    """The line as written."""
    text: str | None = None
    """The value as typed, where a shell had no way to say that it is a string."""

    def problem(self, what: str, remedy: str = "") -> Problem:
        return Problem(what, self.where, self.source, remedy)


DEFAULT = Origin("default", "default")
NOWHERE = Origin("default", "")


@attrs.define
class Tree:
    """Data, and marks that say for the places that were written where that was."""

    data: dict[str, Any] = attrs.field(factory=dict)
    marks: dict[Key, Origin] = attrs.field(factory=dict)

    def origin(self, at: Key) -> Origin:
        return nearest(self.marks, at)


def nearest(marks: Mapping[Key, Origin], at: Key) -> Origin:
    """The mark of this place or of the closest table around it."""
    for length in range(len(at), -1, -1):
        if (mark := marks.get(at[:length])) is not None:
            return mark
    return NOWHERE


def dotted(at: Key) -> str:
    """`router.scorers[0].weight`."""
    text = ""
    for part in at:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def variable(at: Key) -> str:
    """`DYNAMO__ROUTER__SCORERS__0__WEIGHT`."""
    return "__".join(("DYNAMO", *(str(part).upper() for part in at)))
