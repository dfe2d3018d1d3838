"""Where a text can be cut so that its parts, tokenized one by one, give the tokens of the whole.

Cutting is what makes caching possible: a conversation that grows is tokenized from its newest message on, and a document
that many prompts begin with is tokenized once. Two kinds of cuts are exact:

- before a special token, because a tokenizer takes these out of the text before it does anything else;
- before a single space between two visible characters, for tokenizers that split text into words by a pattern known to end a word there.

Which kinds hold is read from the `tokenizer.json`. What is not known to be exact is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

CHUNK = 2048
"""Characters after which a long piece is cut at the next place between two words."""

_BETWEEN_WORDS = re.compile("(?<=[a-z])(?= [a-z])")
_LOOSE_SPACE = re.compile(r" (?:(?<=[^\w!-~] )|(?![\w!-~]))")
"""A space that does not stand between two visible characters. Marks that combine with others do not count as visible."""

# Patterns for which a word ends before a space that stands alone between two visible characters, and that space begins the next: none of
# their words has a space inside, nor at its end unless more space or the end of the text follows. Cutting there cannot change how either side is split.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""".replace(
        r"\r", "\r"
    ).replace(r"\n", "\n")
)
_CL100K = {rf"{suffixes}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}{_TAIL}" for suffixes in _SUFFIXES for digits in ("", "{1,3}")}
_WORDS = frozenset({_GPT2, _O200K, _DEEPSEEK, *_CL100K})
_NEITHER = frozenset({r"\p{N}", r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+"})
"""Patterns of digits or ideographs alone, which have nothing to do with letters and spaces."""


class AddedToken(msgspec.Struct):
    content: str
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Model(msgspec.Struct):
    vocab: msgspec.Raw = msgspec.Raw(b"{}")
    """Most of the file; left as it is until somebody needs it."""


class Definition(msgspec.Struct):
    """The parts of a `tokenizer.json` that matter here."""

    model: Model = msgspec.field(default_factory=Model)
    added_tokens: list[AddedToken] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


def most_characters(definition: Definition) -> int | None:
    """How many characters of text one token can stand for, or `None` where that has no bound."""
    if (definition.decoder or {}).get("type") != "ByteLevel" or any(token.lstrip or token.rstrip for token in definition.added_tokens):
        return None
    normalizers = [step["type"] for step in _steps(definition.normalizer, "normalizers")]
    if normalizers not in ([], ["NFC"]):
        return None
    shrinks = 4 if normalizers else 1  # the longest sequence that NFC composes one character from
    vocabulary = msgspec.json.decode(definition.model.vocab, type=dict[str, msgspec.Raw])
    return shrinks * max(map(len, (*vocabulary, *(token.content for token in definition.added_tokens))), default=0) or None


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, definition: Definition) -> None:
        self.special = _before_special(definition.added_tokens)
        """Finds the special tokens, or `None` when cutting before them is not exact."""
        self.words = _between_words_is_exact(definition)
        self._spaced = [token.content for token in definition.added_tokens if " " in token.content]

    def cut(self, text: str) -> Iterator[str]:
        """The parts of `text`, in order. Where cuts are depends only on what comes before them, so equal beginnings give equal parts."""
        start = 0
        if self.special is not None:
            for match in self.special.finditer(text):
                if match.start() > start:
                    yield from self._chunks(text, start, match.start())
                    start = match.start()
        if start < len(text):
            yield from self._chunks(text, start, len(text))

    def split(self, piece: str) -> list[str] | None:
        """The words of a piece. Each but the first is to be tokenized with a space before it. `None` when that would not be exact."""
        if not self.words or _LOOSE_SPACE.search(piece) is not None or any(token in piece for token in self._spaced):
            return None
        return piece.split(" ")

    def _chunks(self, text: str, start: int, end: int) -> Iterator[str]:
        while self.words and end - start > CHUNK:
            between = _BETWEEN_WORDS.search(text, start + CHUNK, end)
            if between is None:
                break
            yield text[start : between.start()]
            start = between.start()
        yield text[start:end]


def _before_special(added: list[AddedToken]) -> re.Pattern[str] | None:
    raw = [token for token in added if not token.normalized]
    if any(token.lstrip or token.single_word for token in added) or any(token.content[:1].isspace() and other.rstrip for token in raw for other in raw):
        return None  # what stands before a token can change it, or be changed by it
    special = sorted((token.content for token in raw if token.special and token.content), key=len, reverse=True)
    others = [token.content for token in raw if not token.special]
    if not special or any(_overlap(other, content) for other in others for content in special):
        return None
    return re.compile("|".join(map(re.escape, special)))  # the longest first, as tokenizers match


def _overlap(first: str, second: str) -> bool:
    """Whether a match of `first` could take away the beginning of a match of `second`."""
    return second in first or any(second.startswith(first[n:]) for n in range(len(first)))


def _between_words_is_exact(definition: Definition) -> bool:
    if any(token.lstrip or token.rstrip or token.single_word or re.search("[a-z] ([a-z]|$)", token.content) for token in definition.added_tokens):
        return False
    if any(step["type"] != "NFC" for step in _steps(definition.normalizer, "normalizers")):
        return False
    splits = False
    for step in _steps(definition.pre_tokenizer, "pretokenizers"):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                splits = splits or step.get("use_regex", True)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert} if (behavior, invert) in _EACH_MATCH:
                if pattern not in _WORDS and (pattern not in _NEITHER or invert):
                    return False
                splits = splits or pattern in _WORDS
            case {"type": "Digits"}:
                pass
            case _:
                return False
    return splits


_EACH_MATCH = (("Isolated", False), ("Removed", True))
"""Both make each match a word, for patterns that match everything."""


def _steps(definition: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if definition is None:
        return []
    return definition[name] if definition["type"] == "Sequence" else [definition]
