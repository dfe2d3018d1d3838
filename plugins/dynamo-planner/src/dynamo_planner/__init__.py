"""How many workers a fleet needs: what is seen, what is expected, what is decided and why."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.add("planner", "standard", "dynamo_planner.config:Planner", summary="predict, propose, reconcile, constrain; every stage by name")
    registry.add("connector", "local", "dynamo_planner.connectors.local:LocalConnector", summary="workers as processes of this machine")
