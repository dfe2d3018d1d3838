"""Announces the scorer. This module stays light: the policy is imported when a configuration selects it."""

from dynamo_core import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.scorer("shortest-queue", "dynamo_shortest_queue.policy:ShortestQueue", summary="prefers the shortest queue")
