"""What every connector must do: say what runs of each role, and make it so many.

A connector knows replicas and nothing of load, targets or models; whoever decides knows these and nothing of processes or pods.
The numbered guarantees are the specification; `dynamo_core.contracts.connector` tests each under its number.

    C1  `observe` names the roles of the deployment, always all of them, and counts each replica once.
    C2  After `scale` has returned, `observe` shows the targets as `desired`.
    C3  What is desired comes to be, or is said to be `reducible`; `stable` is true then and only then.
    C4  A role that a target does not name stays as it is; so does one whose target is what it has.
    C5  A refusal changes nothing: not one role of several.
    C6  Several roles change together, and what goes down goes first.
    C7  A replica that dies is not counted as ready, and has a successor; `desired` stays.
    C8  A replica that can never serve is `starting` and `reducible`, and the first to go; what serves goes on.
    C9  What cannot be known or done is `ConnectorUnavailable`, never a count of zero and never silence; it passes by itself.
    C10  Calls may be cancelled, and come at once: afterwards `desired` is one of the targets that were asked for, whole. `close` may come twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import attrs

ROLES = ("prefill", "decode", "aggregated")
"""The names that `observe` and `scale` use. A deployment has some of them."""


@attrs.frozen
class RoleState:
    """What runs of one role now. All counts are replicas, and a replica is counted in one of `ready`, `starting` and `draining`."""

    desired: int
    """What the last target, of whoever wrote it, asks for."""
    ready: int
    """Serving."""
    starting: int
    """Wanted, and not serving yet."""
    draining: int
    """Not wanted any more, and not gone yet: they serve their last requests."""
    gpus_per_replica: int
    stable: bool
    """As many are ready as are desired, and nothing starts or drains."""
    reducible: int = 0
    """Of `starting`: will never be ready (no room, a wrong image, crash after crash). Taking them away costs no serving."""


@runtime_checkable
class Connector(Protocol):
    """Where the planner scales. An attrs class: its fields are the options of `[planner] connector = { use = "..." }`."""

    async def start(self) -> None:
        """Connect. :raises ConfigError: the options cannot work here. :raises ConnectorUnavailable: nobody answers."""
        ...

    async def observe(self) -> Mapping[str, RoleState]:
        """What runs now, by role. Never a guess. :raises ConnectorUnavailable: it cannot be known."""
        ...

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        """Make it so many replicas of each role that is named.

        Returns when the write is verified: the next `observe` shows it as `desired`. Replicas come and go afterwards.

        :param reason: one line for people, kept where the platform keeps such things.
        :raises ScaleRefused: and nothing was changed. :raises ConnectorUnavailable: it may or may not have been changed.
        """
        ...

    async def close(self) -> None:
        """Let go of what `start` took. Whether replicas go on is the connector's promise, in its own documentation."""
        ...
