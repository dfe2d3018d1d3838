"""What a connector must do: say what runs of each role, and make it so many. `docs/contracts/connector.md` has the numbered guarantees.

A connector knows replicas and nothing of load, targets or models; whoever decides knows these and nothing of processes or pods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import attrs

from dynamo_core.errors import DynamoError

ROLES = ("prefill", "decode", "aggregated")
"""The names that `observe` and `scale` use. A deployment has some of them."""


@attrs.frozen
class RoleState:
    """What runs of one role now. All counts are replicas, and a replica is counted in one of them at most."""

    desired: int
    """What the last target, of whoever wrote it, asks for."""
    ready: int
    """Serving."""
    starting: int
    """Not serving yet."""
    draining: int
    """Serving their last requests; they take no new ones and will be gone."""
    gpus_per_replica: int
    stable: bool
    """As many are ready as are desired, and nothing starts or drains."""
    reducible: int = 0
    """Of `starting`: will never be ready (no room, a wrong image, crash after crash). Taking them away costs no serving."""


class ConnectorError(DynamoError):
    """Base of what a connector raises on purpose."""

    code: ClassVar[str] = "connector"


class ScaleRefused(ConnectorError):
    """The targets cannot be had: an unknown role, a negative count, no room, somebody else's decision. Repeating them will not help."""

    code = "scale_refused"
    status = 409


class ConnectorUnavailable(ConnectorError):
    """Whoever has to start or stop replicas does not answer, or did not confirm. What runs is unknown; ask again later."""

    code = "connector_unavailable"
    status = 503


class Connector(Protocol):
    """Where the planner scales. Made from its options; its attrs class is the schema of its table in the configuration."""

    async def start(self) -> None:
        """Connect. :raises ConfigError: the options cannot work here. :raises ConnectorUnavailable: nobody answers."""
        ...

    async def observe(self) -> Mapping[str, RoleState]:
        """What runs now, by role. Never a guess. :raises ConnectorUnavailable: it cannot be known."""
        ...

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        """Make it so many replicas of each role that is named; roles that are not named stay as they are.

        Returns when the write is verified: the next `observe` shows it as `desired`. Replicas come and go afterwards.
        Several roles change together: what goes down goes first, and a refusal changes none.

        :param reason: one line for people, kept where the platform keeps such things.
        :raises ScaleRefused: and nothing was changed. :raises ConnectorUnavailable: it may or may not have been changed.
        """
        ...

    async def close(self) -> None:
        """Let go of what `start` took. Whether replicas go on is the connector's promise, in its own documentation. May be called twice."""
        ...
