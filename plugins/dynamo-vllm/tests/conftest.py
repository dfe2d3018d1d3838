"""A tiny model for the real vLLM. What needs vLLM is marked slow, and skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ARGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20, "block_size": 32, "dtype": "float32",
                        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("slow") and Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: plugins/dynamo-vllm/install-cpu.sh"))


@pytest.fixture(scope="session")
def tiny_model() -> ModuleType:
    """The script that makes it."""
    name = "dynamo_vllm_tiny_model"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tiny_model.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_engine(tiny: Path) -> Callable[..., Any]:
    """An engine that starts within seconds; keyword arguments are options, `args` adds to those that fit the tiny model."""
    from dynamo_vllm.engine import VllmEngine

    def make(**options: Any) -> VllmEngine:
        args = {**ARGS, **options.pop("args", {})}
        return VllmEngine(**{"model": str(tiny), "start_method": "fork", "args": args, **options})

    return make
