"""What each token id stands for, as bytes: the table behind incremental text and logprobs.

Two families of decoders, which between them cover nearly every language model, turn each token into bytes without looking
at its neighbours: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM, DeepSeek) and SentencePiece with byte fallback (Llama 2, Mistral,
Gemma). For these the table is exact and decoding is a dictionary look-up. Entries are made as ids are met, so a
vocabulary of 250,000 tokens costs nothing at start.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

_SPACE_MARK = "▁"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("dynamo-each-byte", _each_byte)


def _printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one visible character. Bytes that are not visible moved up beyond U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(0x100 + n): byte for n, byte in enumerate(moved)}


_BYTE_OF = _printable_bytes()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token, written as itself
        return token.encode("utf-8", "surrogatepass")


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPACE_MARK, " ").encode("utf-8", "surrogatepass")


class Vocabulary:
    """Token ids as bytes and as text. Safe to share between requests; not between threads that fill it at once."""

    def __init__(self, tokenizer: Tokenizer, decoder: dict[str, Any] | None) -> None:
        """`decoder`: as the `tokenizer.json` defines it."""
        self.tokenizer = tokenizer
        to_bytes, self.strips_left, self.errors = _family(decoder)
        self.exact = to_bytes is not None
        """Tokens become bytes one by one, so that `shown` and `all` are enough to decode any sequence."""
        self.special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        to_bytes = to_bytes or str.encode
        self.all = Bytes(tokenizer, to_bytes, frozenset())
        """Every token as written."""
        self.shown = Bytes(tokenizer, to_bytes, self.special)
        """The same, with special tokens as nothing."""
        self._pieces: dict[int, tuple[str, list[int]]] = {}

    def bytes(self, *, skip_special_tokens: bool) -> Bytes:
        return self.shown if skip_special_tokens else self.all

    def piece(self, token_id: int) -> tuple[str, list[int]]:
        """One token for a logprobs entry: text (U+FFFD where it is no whole character) and bytes. Do not write to the list."""
        found = self._pieces.get(token_id)
        if found is None:
            data = self.all[token_id] if self.exact else self.tokenizer.decode([token_id], skip_special_tokens=False).encode()
            found = data.decode("utf-8", "replace"), list(data)
            if data:
                self._pieces[token_id] = found
        return found


class Bytes(dict[int, bytes]):
    """Token id to bytes, filled on demand; an id outside the vocabulary is nothing, as in `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, to_bytes: Callable[[str], bytes], skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._skipped = skipped
        self.text = _Texts(self)

    def __missing__(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            data = b""
        else:
            try:
                token = self._tokenizer.id_to_token(token_id)
            except OverflowError:
                token = None
            if token is None:
                return b""  # not kept: ids outside the vocabulary have no end
            data = self._to_bytes(token)
        self[token_id] = data
        return data


class _Texts(dict[int, str | None]):
    """Token id to text, or `None` where the bytes are no whole characters by themselves."""

    def __init__(self, source: Bytes) -> None:
        self._source = source

    def __missing__(self, token_id: int) -> str | None:
        data = self._source[token_id]
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
        if data:
            self[token_id] = text
        return text


def _family(decoder: Any) -> tuple[Callable[[str], bytes] | None, int, str]:
    """How this decoder turns one token into bytes (`None`: not one by one), how many spaces it strips from the start, and
    what it does with bytes that are not UTF-8."""
    chain: list[Any] = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] if step else "" for step in chain]
    if kinds == ["ByteLevel"]:
        return _from_byte_level, 0, "replace"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and chain[0]["pattern"] == {"String": _SPACE_MARK} and chain[0]["content"] == " ":
        if len(kinds) == 3:
            return _from_sentencepiece, 0, "dynamo-each-byte"
        if kinds[3:] == ["Strip"] and chain[3]["content"] == " " and chain[3]["stop"] == 0:
            return _from_sentencepiece, chain[3]["start"], "dynamo-each-byte"
    return None, 0, "replace"
