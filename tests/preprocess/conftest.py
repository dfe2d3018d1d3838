"""Two small tokenizers of the two families that matter, trained here on Python's own documentation strings."""

from __future__ import annotations

import pydoc_data.topics
from functools import cache

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dynamo_core.cards import ModelCard
from dynamo_core.preprocess.text import TextPreprocessor

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def corpus() -> tuple[str, ...]:
    return tuple(text for _, text in sorted(pydoc_data.topics.topics.items()))[:60]


@cache
def byte_level(kind: str = "gpt2") -> bytes:
    """Byte-level BPE: `gpt2`, `smollm` (digits apart), `llama3` (its word pattern, a BOS) or `qwen` (NFC)."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = {
        "gpt2": gpt2, "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), "llama3": words, "qwen": words,
    }[kind]  # fmt: skip
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<Tool Call>", normalized=False), AddedToken("<é>", normalized=False)])
    if kind == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return tokenizer.to_str().encode()


@cache
def sentencepiece(strip: bool = True) -> bytes:
    """BPE with byte fallback, as Llama 2 (`strip`) and Gemma define it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for training only: keeps words apart
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False, limit_alphabet=200))
    import json

    definition = json.loads(tokenizer.to_str())
    definition["pre_tokenizer"] = None
    definition["added_tokens"] = definition["added_tokens"][:3]
    definition["decoder"] = {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                             {"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else [])]}  # fmt: skip
    return json.dumps(definition).encode()


@cache
def wordpiece() -> bytes:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(corpus()[:10], trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["[UNK]"], show_progress=False))
    return tokenizer.to_str().encode()


DEFINITIONS = {
    "gpt2": byte_level, "smollm": lambda: byte_level("smollm"), "llama3": lambda: byte_level("llama3"), "qwen": lambda: byte_level("qwen"),
    "llama2": sentencepiece, "gemma": lambda: sentencepiece(False),
}  # fmt: skip


@pytest.fixture(scope="session", params=list(DEFINITIONS))
def tokenizer_json(request: pytest.FixtureRequest) -> bytes:
    return DEFINITIONS[request.param]()


@pytest.fixture(scope="session")
def wordpiece_json() -> bytes:
    return wordpiece()


@pytest.fixture(scope="session")
def chatml() -> TextPreprocessor:
    """A preprocessor whose end-of-sequence token is `<|im_end|>` (2)."""
    card = ModelCard(name="small", chat_template=CHATML, eos_token_ids=(2,), context_length=4096, vocab_size=2002)
    return TextPreprocessor(card, byte_level("smollm"))
