"""Servers for the tests: one in this process that speaks as vLLM does, and the real `vllm serve`, where it is installed, for what is marked slow."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dynamo_core.engines import byte_tokenizer

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # for what tests here share


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("slow") and HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM: plugins/dynamo-vllm/install-cpu.sh"))


def _module(path: Path) -> ModuleType:
    name = f"dynamo_openai_tests_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def wire() -> Any:
    """The module of the server in this process: `async with wire.serving(...) as server`."""
    return _module(HERE / "wire_server.py")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of that server's model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(byte_tokenizer.tokenizer_json())
    about = {"eos_token": {"content": "<|im_end|>"}, "chat_template": [{"name": "default", "template": byte_tokenizer.CHAT_TEMPLATE}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [byte_tokenizer.TURN_END], "temperature": 0.9}))
    return folder


@pytest.fixture(scope="session")
def make_engine(folder: Path) -> Callable[..., Any]:
    from dynamo_openai.engine import OpenAIEngine

    def make(server: Any, **options: Any) -> OpenAIEngine:
        return OpenAIEngine(**{"url": server.url, "tokenizer": str(folder), "poll_interval": 0.05, **options})

    return make


@pytest.fixture(scope="session")
def vllm_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two real servers of one tiny model."""
    with _module(HERE / "vllm_servers.py").two(tmp_path_factory.mktemp("vllm")) as servers:
        yield servers
