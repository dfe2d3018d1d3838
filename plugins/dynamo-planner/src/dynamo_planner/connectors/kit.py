"""The conformance kit of connectors, which is the core's: `dynamo_core.contracts.ConnectorContract`."""

from dynamo_core.contracts.connector import ConnectorContract

__all__ = ["ConnectorContract"]
