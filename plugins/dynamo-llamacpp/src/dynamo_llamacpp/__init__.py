"""The embedded real engine: llama.cpp inside the worker process. Importing this module loads no engine."""

from __future__ import annotations

from dynamo_core.hookspecs import hookimpl
from dynamo_core.plugins import Registry


@hookimpl
def dynamo_register(registry: Registry) -> None:
    registry.engine("llamacpp", "dynamo_llamacpp.engine:LlamaCppEngine", summary="llama.cpp in the worker process: GGUF models on the CPU", stability="beta")
