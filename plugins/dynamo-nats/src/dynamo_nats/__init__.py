"""NATS: a request plane and an event plane for fleets whose network runs through a broker."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.request_plane("nats", "dynamo_nats.plane:NatsPlane", summary="multiplexed streams through NATS, step-batched")
    registry.event_plane("nats", "dynamo_nats.events:NatsEvents", summary="events through NATS: at most once, or durable in JetStream")
