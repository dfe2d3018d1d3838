"""The files that say how a model reads and writes text: from a folder, or from Hugging Face."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import attrs
from tokenizers import Tokenizer

from dynamo_core.errors import ConfigError, Problem

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"]
_REMEDY = "set `tokenizer` to a folder with tokenizer.json, tokenizer_config.json and generation_config.json, or to a Hugging Face id"


@attrs.frozen
class Texts:
    """What a frontend needs to turn text into tokens of the model, and back."""

    tokenizer: bytes
    """A `tokenizer.json`."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    template_tokens: dict[str, str]
    add_bos: bool
    default_max_tokens: int | None


def found(option: str | None, root: str | None) -> Path:
    """The folder. Blocks while it downloads. :param root: of the model, as the server names it. :raises ConfigError: there is none."""
    name = option or root or ""
    if (path := Path(name).expanduser()).is_dir() and name:
        return path
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    if option:
        raise ConfigError(Problem(f"tokenizer: there is no folder {option!r}", remedy=_REMEDY))
    said = f"its model is at {root!r}, and there is no such folder here" if root else "it does not say which model it has loaded"
    raise ConfigError(Problem(f"the server's tokenizer is not known: {said}", remedy=_REMEDY))


def _from_hub(repo: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(Problem(f"the tokenizer of {repo!r} is on Hugging Face, and huggingface-hub is not installed",
                                  remedy=f"pip install dynamo-openai[huggingface], or {_REMEDY}"))  # fmt: skip
    hub: Any = importlib.import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=_FILES))
    except Exception as e:  # the library raises classes of others and its own
        raise ConfigError(Problem(f"the tokenizer of {repo!r} could not be fetched from Hugging Face: {type(e).__name__}: {e}",
                                  remedy=f"check the connection (HF_TOKEN for gated models), or {_REMEDY}")) from e  # fmt: skip


def read(folder: Path) -> Texts:
    """:raises ConfigError: a file is missing or makes no sense."""
    try:
        raw = (folder / "tokenizer.json").read_bytes()
    except OSError as e:
        raise ConfigError(Problem(f"cannot read {folder / 'tokenizer.json'}: {e.strerror}", remedy=_REMEDY)) from e
    try:
        tokenizer = Tokenizer.from_buffer(raw)
        settings, generation, config = (_optional(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json"))
        special = {name: text for name in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := _text(settings.get(name)))}
        more: Any = generation.get("eos_token_id", config.get("eos_token_id"))
        ends = [tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None, *(more if isinstance(more, list) else [more])]
        return Texts(
            raw, max(int(config.get("vocab_size") or 0), tokenizer.get_vocab_size(with_added_tokens=True)),
            tuple(dict.fromkeys(token for token in ends if isinstance(token, int))), _template(folder, settings), special,
            bool(tokenizer.encode("").ids), generation.get("max_new_tokens"),
        )  # fmt: skip
    except Exception as e:  # the tokenizers library raises bare Exception
        raise ConfigError(Problem(f"{folder} is not the tokenizer of a model: {type(e).__name__}: {e}", remedy=_REMEDY)) from e


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """From a file of its own, or from the settings: one template, or several of which one is the default."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((each["template"] for each in template if each["name"] == "default"), None)
    return template


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes()) if path.exists() else {}
