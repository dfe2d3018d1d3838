"""A tiny Llama of random weights in a real GGUF file, so that the quick suite runs on the real llama.cpp."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXT = """The quick brown fox jumps over the lazy dog. It's 12345 o'clock, we'll see; they've said DON'T!
def tokenize(text: str) -> list[int]:\n    for i in range(10):\n        if text[i] == "\\n":\n            return []\n\n\treturn [0x1F, 3.14e-5]
Größe, façade, naïve, Ærøskøbing; Привет, мир! Γειά σου Κόσμε.
שלום עולם. مرحبا بالعالم. नमस्ते दुनिया.

こんにちは世界、カタカナ。你好，世界！안녕하세요.
😀🎉🚀 👩‍👩‍👧‍👦 🇩🇪 é (e + combining) ½ ² ³ Ⅷ ①  \u00a0 \u2003 \u200b ﬁ
{"json": [1, 2, 3], "nested": {"a": null, "b": true}}  <html><body class='x'>&amp;</body></html>
"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """GGUF version 3. Ints become u32 (lists of them i32), floats f32."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return struct.pack("<Q", len(raw)) + raw

    def value(item: Any) -> bytes:
        if isinstance(item, bool):
            return struct.pack("<I?", 7, item)
        if isinstance(item, int):
            return struct.pack("<II", 4, item)
        if isinstance(item, float):
            return struct.pack("<If", 6, item)
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        if item and isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)

    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    header += [text(key) + value(item) for key, item in metadata.items()]
    offset, blobs = 0, []
    for name, tensor in tensors.items():
        blob = tensor.astype(np.float32).tobytes()
        blob += b"\0" * (-len(blob) % 32)
        header.append(text(name) + struct.pack(f"<I{tensor.ndim}QIQ", tensor.ndim, *reversed(tensor.shape), 0, offset))
        offset += len(blob)
        blobs.append(blob)
    head = b"".join(header)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"".join(blobs))
    return path


def vocabulary(pattern: str = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+", size: int = 700) -> tuple[list[str], list[str]]:
    """Tokens (special ones first) and merges, trained on `TEXT`; every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens, [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]


def tiny_llama(path: Path, *, pre: str = "smollm", context: int = 2048, add_bos: bool = False, **more: Any) -> Path:
    """Two layers, 64 wide, weights from a fixed seed: its answers are noise, and always the same noise."""
    tokens, merges = vocabulary()
    width, heads, kv_heads, inner, layers = 64, 4, 2, 128, 2
    metadata: dict[str, Any] = {
        "general.architecture": "llama", "general.name": "tiny", "llama.context_length": context,
        "llama.embedding_length": width, "llama.block_count": layers,
        "llama.feed_forward_length": inner, "llama.attention.head_count": heads, "llama.attention.head_count_kv": kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": width // heads, "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": add_bos, "tokenizer.chat_template": CHAT,
    } | more  # fmt: skip
    dice = np.random.default_rng(7)

    def weights(*shape: int) -> np.ndarray:
        return dice.normal(0, 0.3, shape)

    tensors = {"token_embd.weight": weights(len(tokens), width), "output_norm.weight": np.ones(width), "output.weight": weights(len(tokens), width)}
    for i in range(layers):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(width), f"blk.{i}.ffn_norm.weight": np.ones(width),
            f"blk.{i}.attn_q.weight": weights(width, width), f"blk.{i}.attn_k.weight": weights(width // heads * kv_heads, width),
            f"blk.{i}.attn_v.weight": weights(width // heads * kv_heads, width), f"blk.{i}.attn_output.weight": weights(width, width),
            f"blk.{i}.ffn_gate.weight": weights(inner, width), f"blk.{i}.ffn_up.weight": weights(inner, width),
            f"blk.{i}.ffn_down.weight": weights(width, inner),
        }  # fmt: skip
    return write_gguf(path, metadata, tensors)


@pytest.fixture(scope="session")
def gguf_writer() -> Callable[..., Path]:
    return write_gguf


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Path]:
    return tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def varied_text() -> str:
    return TEXT
