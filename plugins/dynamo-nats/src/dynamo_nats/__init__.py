"""NATS: a request plane, an event plane, a discovery store and shared limits for fleets whose network runs through a broker."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.request_plane("nats", "dynamo_nats.plane:NatsPlane", summary="multiplexed streams through NATS, step-batched")
    registry.event_plane("nats", "dynamo_nats.events:NatsEvents", summary="events through NATS: at most once, or durable in JetStream")
    registry.discovery("nats", "dynamo_nats.discovery:NatsDiscovery", summary="a JetStream stream, for fleets that run NATS anyway")
    registry.add("rate_limiter", "nats-per-tenant", "dynamo_nats.limits:NatsPerTenant", summary="limits for each tenant, counted by all frontends together")
