"""Routing by what the workers hold in their KV caches."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.facts("kv-index", "dynamo_kv_router.provider:KvIndex", summary="how much of the prompt each worker holds, by tier, and whether to believe it")
    registry.scorer("kv-overlap", "dynamo_kv_router.overlap:KvOverlap", summary="prefers the worker that holds most of the prompt")
    registry.facts("kv-load", "dynamo_kv_router.load:KvLoad", summary="prompt blocks of requests in progress, shared ones counted once")
    registry.facts("engine-model", "dynamo_kv_router.model:EngineModel", summary="work in milliseconds, by prices learned from the engines")
    registry.scorer("kv-cost", "dynamo_kv_router.cost:KvCost", summary="Dynamo's cost function: prefill less credit for cache, and blocks in use")
    registry.scorer("kv-plus", "dynamo_kv_router.plus:KvPlus", summary="the time that the request costs, its own and that of others")
    registry.policy("kv", "dynamo_kv_router.presets:Kv", summary="Dynamo's KV routing, with all its weights")
    registry.policy("kv-plus", "dynamo_kv_router.presets:KvPlusPreset", summary="KV routing by learned engine times")
    registry.facts("sessions", "dynamo_kv_router.affinity:Sessions", summary="which worker served a session last")
    registry.filter("session", "dynamo_kv_router.affinity:SessionFilter", summary="keeps the worker that the session is bound to")
    registry.scorer("session-affinity", "dynamo_kv_router.affinity:SessionAffinity", summary="prefers the worker that the session is bound to")
    registry.filter("kv-busy", "dynamo_kv_router.busy:KvBusy", summary="drops workers that have enough to do; 529 when all have")
    registry.facts("adapters", "dynamo_kv_router.adapters:Adapters", summary="who has which LoRA adapter")
    registry.filter("adapter", "dynamo_kv_router.adapters:AdapterFilter", summary="drops workers that cannot serve the adapter")
    registry.scorer("adapter-affinity", "dynamo_kv_router.adapters:AdapterAffinity", summary="prefers workers that have the adapter in memory")
    registry.cli("router", "dynamo_kv_router.command:router", summary="route for others, over a request plane and HTTP")
