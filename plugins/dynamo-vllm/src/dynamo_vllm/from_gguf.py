"""`python -m dynamo_vllm.from_gguf FILE.gguf DIRECTORY`: a GGUF model in the form that vLLM loads, so that both engines can serve one model.

Needs the package `gguf` beside vLLM. The weights become bfloat16, so a quantized file grows and its answers stay those of the quantized weights.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def convert(source: Path, directory: Path) -> Path:
    """Write the model's weights, configuration and tokenizer below `directory`."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    config: dict[str, Any] = model.config.to_dict()
    config.pop("quantization_config", None)
    config["dtype"] = "bfloat16"
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=1, default=str))
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m dynamo_vllm.from_gguf FILE.gguf DIRECTORY")
    print(convert(Path(sys.argv[1]), Path(sys.argv[2])))  # noqa: T201
