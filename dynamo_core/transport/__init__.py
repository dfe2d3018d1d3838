"""The request plane: streams to named endpoints. The contract is in `contract.py`; `tcp`, `http` and `in-process` are built in."""

from dynamo_core.transport.contract import Channel, Handler, Item, RequestPlane, Server, Stream

__all__ = ["Channel", "Handler", "Item", "RequestPlane", "Server", "Stream"]
