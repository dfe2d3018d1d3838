"""Stacks that have a name, for users who want one word in their configuration: `[router] use = "least-loaded"`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen
class RoundRobin:
    """Every worker in turn."""

    def stack(self) -> Mapping[str, Any]:
        return {"filters": [{"use": "taints"}], "scorers": [{"use": "turn"}]}


@attrs.frozen
class Random:
    """Any worker, all alike."""

    def stack(self) -> Mapping[str, Any]:
        return {"filters": [{"use": "taints"}], "picker": {"use": "uniform"}}


@attrs.frozen
class LeastLoaded:
    """The worker with the fewest requests in progress."""

    def stack(self) -> Mapping[str, Any]:
        return {"filters": [{"use": "taints"}], "scorers": [{"use": "load"}]}


@attrs.frozen
class PowerOfTwoChoices:
    """Two workers by chance, and of them the less loaded one."""

    def stack(self) -> Mapping[str, Any]:
        return {"filters": [{"use": "taints"}], "scorers": [{"use": "load"}], "picker": {"use": "power-of-two"}}


@attrs.frozen
class Direct:
    """The worker that the caller names, or an error."""

    def stack(self) -> Mapping[str, Any]:
        return {"filters": [{"use": "pinned", "required": True}]}
