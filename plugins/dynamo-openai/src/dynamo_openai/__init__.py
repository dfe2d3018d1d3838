"""A plain OpenAI-compatible server as an engine of the fleet. Importing this module loads nothing else."""

from __future__ import annotations

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.engine("openai", "dynamo_openai.engine:OpenAIEngine", summary="a server that runs already, such as `vllm serve`, over HTTP", stability="beta")
