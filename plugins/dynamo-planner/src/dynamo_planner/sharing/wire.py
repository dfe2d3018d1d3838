"""What planners and the global planner say to each other: JSON over HTTP, `POST /v1/ask` with `Authorization: Bearer TOKEN`.

Who asks is told by the token and by nothing in the body.
"""

from __future__ import annotations

import msgspec

PATH = "/v1/ask"


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A planner's wish, and its sign of life."""

    wanted: int
    """GPUs that all its roles together shall use."""
    in_use: int
    """GPUs that its replicas use now, those that start and drain included."""
    reason: str = ""
    """One line for people."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`sharing.ledger.Grant`, and when to ask again. All counts are GPUs."""

    planner: str
    """Whom the token stands for."""
    granted: int
    parked: int | None
    free: int
    limit: int | None
    why: str
    lease: float
    """Seconds within which the next call must come."""
