"""vLLM as an engine: its `AsyncLLM` in the worker process. Importing this module loads no vLLM."""

from __future__ import annotations

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.engine("vllm", "dynamo_vllm.engine:VllmEngine", summary="vLLM in the worker process: any model that vLLM serves, on GPU or CPU", stability="beta")
