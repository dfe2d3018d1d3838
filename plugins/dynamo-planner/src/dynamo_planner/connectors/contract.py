"""The contract of connectors, which is the core's: plugins implement it, and plugins do not import each other."""

from dynamo_core.errors import ConnectorUnavailable, ScaleRefused
from dynamo_core.scaling.contract import ROLES, Connector, RoleState

__all__ = ["ROLES", "Connector", "ConnectorUnavailable", "RoleState", "ScaleRefused"]
