"""LoRA adapters: loaded, unloaded and listed while the engine runs; each is a model with a card of its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.errors import RequestError
from dynamo_core.types import Request
from dynamo_vllm.vllm_api import Vllm


class Adapters:
    def __init__(self, vllm: Vllm, engine: Any, base: ModelCard, changed: Callable[[], None]) -> None:
        self._vllm = vllm
        self._engine = engine
        self._base = base
        self._changed = changed
        self._loaded: dict[str, Any] = {}
        self._ids = itertools.count(1)
        self._changing = asyncio.Lock()

    def cards(self) -> Sequence[ModelCard]:
        """What the base model promises, under the adapter's name."""
        return [msgspec.structs.replace(self._base, name=name, aliases=(), adapter=name) for name in self._loaded]

    def of(self, request: Request) -> Any:
        """vLLM's word for the adapter that the request wants. :raises RequestError: it is not loaded."""
        if request.adapter is None:
            return None
        found = self._loaded.get(request.adapter)
        if found is None:
            known = ", ".join(self._loaded) or "none"
            raise RequestError(f"the adapter {request.adapter!r} is not loaded; loaded are: {known}", param="adapter")
        return found

    async def load(self, name: str, path: Path) -> None:
        """Try it at once: a request with a bad path would take the whole engine down."""
        async with self._changing:
            if name in self._loaded:
                raise RequestError(f"the adapter {name!r} is loaded already; unload it first", param="name")
            if not (path / "adapter_config.json").is_file():
                raise RequestError(f"{path} is not the directory of a LoRA adapter: it has no adapter_config.json", param="path")
            wanted = self._vllm.LoRARequest(lora_name=name, lora_int_id=next(self._ids), lora_path=str(path))
            try:
                await self._engine.add_lora(wanted)
            except self._vllm.EngineDeadError:
                raise
            except Exception as e:
                raise RequestError(f"vLLM cannot load the adapter {name!r} from {path}: {e}", param="path") from e
            self._loaded[name] = wanted
        self._changed()

    async def unload(self, name: str) -> None:
        """Not offered any more, then gone; requests that run with it end first."""
        async with self._changing:
            if (found := self._loaded.pop(name, None)) is None:
                raise RequestError(f"the adapter {name!r} is not loaded", param="name")
            self._changed()
            await self._engine.remove_lora(found.lora_int_id)

    # -------------------------------------------------------------- as an operator asks

    async def load_action(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        name, path = arguments.get("name"), arguments.get("path")
        if not isinstance(name, str) or not isinstance(path, str):
            raise RequestError('load_adapter needs {"name": ..., "path": ...}')
        await self.load(name, Path(path))
        return await self.list_action({})

    async def unload_action(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(name := arguments.get("name"), str):
            raise RequestError('unload_adapter needs {"name": ...}')
        await self.unload(name)
        return await self.list_action({})

    async def list_action(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"adapters": {name: found.lora_path for name, found in self._loaded.items()}}
