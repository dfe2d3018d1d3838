"""What the simulated model reads and writes with: a tokenizer, a chat template, and the tokens that it answers with.

Without a `model_path` it is a byte-level BPE over a few hundred English words, built in code, the same in every process.
With one, the files of a real model are used (`tokenizer.json`, `tokenizer_config.json`, `config.json`,
`generation_config.json`), so that prompts have their real lengths; the weights are not read.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.engines import byte_tokenizer
from dynamo_core.errors import ConfigError, Problem
from dynamo_sim.words import WORDS

_SPACE = byte_tokenizer.byte_alphabet()[ord(" ")]
_ANSWER = re.compile(rf"[{_SPACE}\u2581][a-z]+")
"""Vocabulary entries that are a space and a word, in byte-level (the first) and sentencepiece spelling."""
_ANSWERS = 4096


@attrs.frozen
class Vocabulary:
    tokenizer: bytes
    """A `tokenizer.json`."""
    size: int
    answers: tuple[int, ...]
    """The tokens that answers consist of: each a space and a word."""
    eos_token_ids: tuple[int, ...]
    """The first is the one that ends an answer."""
    chat_template: str | None = byte_tokenizer.CHAT_TEMPLATE
    template_tokens: dict[str, str] = attrs.field(factory=lambda: {"eos_token": "<|im_end|>"})
    add_bos: bool = False


@functools.cache
def built_in() -> Vocabulary:
    """Bytes, every beginning of every word with and without a space before it, and three special tokens.

    One for all engines of a process, of which there may be thousands.
    """
    alphabet = byte_tokenizer.byte_alphabet()
    vocab = {char: byte for byte, char in enumerate(alphabet)}
    merges: list[str] = []
    for lead in (_SPACE, ""):
        for word in WORDS:
            text = lead + word
            for cut in range(1, len(text)):
                if text[: cut + 1] not in vocab:
                    vocab[text[: cut + 1]] = len(vocab)
                    merges.append(f"{text[:cut]} {text[cut]}")
    answers = tuple(vocab[_SPACE + word] for word in WORDS)
    tokenizer = json.loads(byte_tokenizer.tokenizer_json())
    tokenizer["model"].update(vocab=vocab, merges=merges)
    for i, added in enumerate(tokenizer["added_tokens"]):
        added["id"] = len(vocab) + i
    end_of_text, _, turn_end = (added["id"] for added in tokenizer["added_tokens"])
    return Vocabulary(json.dumps(tokenizer, ensure_ascii=False).encode(), turn_end + 1, answers, (turn_end, end_of_text))


def of_model(path: Path) -> Vocabulary:
    """The vocabulary of a model directory. :raises ConfigError: a file is missing or makes no sense."""
    raw = _read(path / "tokenizer.json")
    try:
        tokenizer: dict[str, Any] = json.loads(raw)
        added: list[dict[str, Any]] = tokenizer.get("added_tokens") or []
        ids = _ids(tokenizer["model"]["vocab"])
        by_text: dict[str, int] = {**ids, **{token["content"]: token["id"] for token in added}}
        config, generation, settings = (_optional(path / name) for name in ("config.json", "generation_config.json", "tokenizer_config.json"))
        special = {name: text for name in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := _text(settings.get(name)))}
        eos: Any = generation.get("eos_token_id", config.get("eos_token_id", by_text.get(special.get("eos_token", ""))))
        eos_ids: tuple[int, ...] = tuple(eos) if isinstance(eos, list) else (eos,)
        answers = sorted(number for text, number in ids.items() if _ANSWER.fullmatch(text) and number not in eos_ids)[:_ANSWERS]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(Problem(f"{path} is not a model that the simulator understands: {type(e).__name__}: {e}")) from e
    if not answers or not all(isinstance(number, int) for number in eos_ids):
        missing = "words in the vocabulary" if not answers else "end-of-sequence token"
        raise ConfigError(Problem(f"{path}: no {missing} found", remedy="leave out model_path to use the built-in vocabulary"))
    size = max(config.get("vocab_size") or 0, max(by_text.values()) + 1)
    return Vocabulary(raw, size, tuple(answers), eos_ids, _template(path, settings), special, bool(settings.get("add_bos_token")))


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    """From a file of its own, or from the settings: one template, or several of which one is the default."""
    if (path / "chat_template.jinja").exists():
        return (path / "chat_template.jinja").read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _ids(vocab: dict[str, int] | list[list[Any]]) -> dict[str, int]:
    """Text to id; unigram models write a list of `[text, score]`."""
    return vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(Problem(f"cannot read {path}: {e.strerror}", remedy="model_path is a directory with tokenizer.json in it")) from e


def _optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
