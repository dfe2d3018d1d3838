"""The event plane: who announces what to whom. The contract is in `contract.py`; `in-process` and `zmq` are built in."""

from dynamo_core.events.contract import Event, EventContext, EventPlane, Gap, Left, Notice, Publisher, Subscription

__all__ = ["Event", "EventContext", "EventPlane", "Gap", "Left", "Notice", "Publisher", "Subscription"]
