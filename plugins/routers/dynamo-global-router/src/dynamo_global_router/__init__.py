"""A router above several pools of one model: it picks the pool, and the pool's own router picks the worker."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.engine("global-router", "dynamo_global_router.engine:GlobalRouter", summary="forwards each request to the pool that meets its latency target")
    registry.add("pool_strategy", "grid", "dynamo_global_router.grid:Grid", summary="looks the pool up by prompt length and latency targets")
    registry.add("pool_strategy", "predicted", "dynamo_global_router.predicted:Predicted", summary="the cheapest pool that is expected to meet the targets")
