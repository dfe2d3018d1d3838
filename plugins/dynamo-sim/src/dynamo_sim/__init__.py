"""A simulated engine: the scheduling, cache and timing of a GPU engine, without the GPU."""

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.engine("sim", "dynamo_sim.engine:SimEngine", summary="simulated: continuous batching, paged prefix cache, scaled time")
    registry.cli("replay trace", "dynamo_sim.replay.command:replay", summary="replay a request trace in virtual time, and compare routing stacks")
