"""Scaling: whoever decides how many replicas there are asks a connector to make it so. The contract is in `contract.py`."""

from dynamo_core.errors import ConnectorUnavailable, ScaleRefused
from dynamo_core.scaling.contract import ROLES, Connector, RoleState

__all__ = ["ROLES", "Connector", "ConnectorUnavailable", "RoleState", "ScaleRefused"]
