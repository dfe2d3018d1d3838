"""vLLM's `ECExampleConnector`, whose files appear whole: it writes where readers look, and an engine that reads half a file dies of it.

Half a file is there while two encode workers write the same image, and for ever when one is killed meanwhile; then the request takes the next engine with it.
vLLM imports this module where it is needed, by its path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from dynamo_vllm.vllm_api import attr

_Example: Any = attr("vllm.distributed.ec_transfer.ec_connector.example_connector", "ECExampleConnector")


class SharedFolder(_Example):
    """What stands in for `ECExampleConnector`."""

    def save_caches(self, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None:
        if not self.is_producer:
            return
        with attr("vllm.utils.gpu_sync_debug", "gpu_sync_allowed")():
            tensors = {"ec_cache": encoder_cache[mm_hash].detach().cpu().contiguous()}
        place = Path(self._generate_filename_debug(mm_hash))
        part = place.with_name(f"{uuid4().hex}.part")
        try:
            attr("safetensors.torch", "save_file")(tensors, part)
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
