"""Makes a Hugging Face `tokenizer.json` from GGUF metadata that cuts text exactly as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from dynamo_core.errors import ConfigError, Problem

# How text is cut into words before merging. Each pattern splits what the one before it left over.
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_DIGIT = r"\p{N}"


@attrs.frozen
class _Style:
    """One pre-tokenizer of llama.cpp."""

    splits: tuple[str, ...]
    whole_words_first: bool = False
    """A word that is a token itself is not merged from its parts (`ignore_merges`)."""
    add_bos: bool = False
    """What holds when the file does not say."""


_STYLES: Mapping[str, _Style] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe", "exaone4"), _Style((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _Style((_DIGIT, _GPT2))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _Style((_LLAMA3,), whole_words_first=True, add_bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Style((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), _Style((_QWEN2,))),
}
SUPPORTED = tuple(_STYLES)
"""Values of `tokenizer.ggml.pre` that we can reproduce."""

_CONTROL, _USER_DEFINED = 3, 4

# llama.cpp takes these for the end of an answer by their text alone, whatever the file says.
_END_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|ifm|im_end|>",
))  # fmt: skip
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


@attrs.frozen
class Vocabulary:
    """What the file says about tokens."""

    tokens: tuple[str, ...]
    """Text of each token as stored: byte-level characters, special tokens literally."""
    special: Mapping[int, bool]
    """Tokens that are found in text before anything else: whether each is a control token (or one that users defined)."""
    bos: int | None
    eos: int | None
    ends: tuple[int, ...]
    """Every token that ends an answer, the end-of-sequence token first."""
    add_bos: bool
    tokenizer_json: bytes

    @property
    def forbidden(self) -> int | None:
        """A control token that ends nothing, so that no grammar may allow it; `None` when there is none."""
        return next((token for token, control in self.special.items() if control and token not in self.ends), None)


def vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """:raises ConfigError: the file's tokenizer is of a kind that cannot be reproduced."""
    style = _style(metadata)
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise ConfigError(Problem("the model's file has no vocabulary", remedy="choose a model that was converted with its tokenizer"))
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    bos = _special(metadata, "bos", len(tokens))
    eos = _special(metadata, "eos", len(tokens))
    ends = [i for name in _END_KEYS if (i := _special(metadata, name, len(tokens))) is not None]
    ends += [i for i, token in enumerate(tokens) if token in _END_TEXTS]
    special = {i: kind == _CONTROL for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)}
    special.update((i, True) for i in ends if tokens[i] in _END_TEXTS)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", style.add_bos)) and bos is not None
    content = _tokenizer_json(tokens, metadata.get("tokenizer.ggml.merges") or [], special, style, bos if add_bos else None)
    return Vocabulary(tuple(tokens), special, bos, eos, tuple(dict.fromkeys(ends)), add_bos, content)


def byte_pieces(vocab: Vocabulary) -> list[bytes]:
    """The bytes that llama.cpp prints for each token: control tokens print nothing, user-defined ones their text."""
    byte_of = {char: byte for byte, char in enumerate(_byte_characters())}
    pieces = [bytes(byte_of.get(char, 0x3F) for char in token) for token in vocab.tokens]
    for i, control in vocab.special.items():
        pieces[i] = b"" if control else vocab.tokens[i].encode("utf-8", "surrogateescape")
    return pieces


def _style(metadata: Mapping[str, Any]) -> _Style:
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ConfigError(Problem(f"the model's tokenizer is of the kind {model!r}; only byte-level BPE ('gpt2') can be reproduced for the frontend",
                                  remedy="choose a model of the Llama 3, Qwen 2/3, SmolLM, StarCoder or GPT-2 families"))
    if (style := _STYLES.get(pre or "")) is None:
        raise ConfigError(Problem(f"the model's pre-tokenizer {pre!r} is not supported", remedy=f"supported: {', '.join(SUPPORTED)}"))
    return style


def _special(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    token = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return token if isinstance(token, int) and 0 <= token < size else None


def _tokenizer_json(tokens: list[str], merges: list[str], special: Mapping[int, bool], style: _Style, bos: int | None) -> bytes:
    splits = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in style.splits]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": control}
                for i, control in special.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "post_processor": None if bos is None else _bos_first(bos, tokens[bos]),
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                      "byte_fallback": False, "ignore_merges": style.whole_words_first, "vocab": _ids(tokens), "merges": [_pair(m) for m in merges]},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode("utf-8", "replace")


def _ids(tokens: list[str]) -> dict[str, int]:
    """Text to id. Padding may repeat a text: the first id keeps it, so that no id changes its meaning."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    return ids


def _pair(merge: str) -> list[str]:
    """A merge is two texts with a space between; a text may itself begin with one, never be empty."""
    cut = merge.index(" ", 1)
    return [merge[:cut], merge[cut + 1 :]]


def _bos_first(bos: int, text: str) -> dict[str, Any]:
    first, sequence = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [bos], "tokens": [text]}},
    }


def _byte_characters() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    replacements = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(replacements)) for byte in range(256)]
