"""A tiny model for the real vLLM. What needs vLLM is marked slow, and skipped where it is not installed."""

from __future__ import annotations

import base64
import faulthandler
import importlib.util
import io
import multiprocessing.context
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="session", autouse=True)
def stacks_on_demand() -> None:
    """A forked engine core that gets SIGUSR1 says where it is."""
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


@pytest.fixture(autouse=True)
def where_engine_cores_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shortly before a test is ended by its timeout, the engine cores show their stacks: the test's own says only that it waits for them."""
    marker = request.node.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker and marker.args else request.config.getini("timeout") or 300)

    def show() -> None:
        for child in multiprocessing.active_children():
            if isinstance(child, multiprocessing.context.ForkProcess) and child.pid is not None:
                print(f"process {child.pid}, {child.name}:", file=sys.stderr)
                os.kill(child.pid, signal.SIGUSR1)

    timer = threading.Timer(limit * 0.95, show)
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


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
def seeing(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> Path:
    """A model that sees."""
    return tiny_model.make_seeing(tmp_path_factory.mktemp("models") / "seeing")


@pytest.fixture(scope="session")
def seeing_args() -> dict[str, Any]:
    return {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 32 << 20, "block_size": 32, "dtype": "float32"}


Color = tuple[int, int, int]


@pytest.fixture(scope="session")
def image() -> Callable[[Color], Any]:
    def image(color: Color) -> Any:
        from PIL import Image

        return Image.new("RGB", (40, 30), color)

    return image


@pytest.fixture(scope="session")
def image_body(image: Callable[[Color], Any]) -> Callable[..., dict[str, Any]]:
    """A chat with a text, images of these colors, and a text after them."""

    def uri(color: Color) -> str:
        file = io.BytesIO()
        image(color).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    def body(*colors: Color, text: str = "What is it?") -> dict[str, Any]:
        content: list[Any] = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": uri(color)}} for color in colors),
                              {"type": "text", "text": " Say."}]  # fmt: skip
        return {"model": "seeing", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, "ignore_eos": True,
                "dynamo": {"annotations": ["token_ids", "prompt_token_ids"]}}  # fmt: skip

    return body


@pytest.fixture(scope="session")
def make_engine(tiny: Path) -> Callable[..., Any]:
    """An engine that starts within seconds; keyword arguments are options, `args` adds to those that fit the tiny model."""
    from dynamo_vllm.engine import VllmEngine

    def make(**options: Any) -> VllmEngine:
        args = {**ARGS, **options.pop("args", {})}
        return VllmEngine(**{"model": str(tiny), "start_method": "fork", "args": args, **options})

    return make
