"""Token ids to text, a few at a time, never splitting a character."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from dynamo_core.preprocess.vocabulary import Vocabulary


class Detokenizer(Protocol):
    """All texts that `push` and then `flush` return, joined, are what decoding all ids at once gives."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What was held back, at the end: bytes that never became a character are U+FFFD."""
        ...


def detokenizer(vocabulary: Vocabulary, *, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()) -> Detokenizer:
    """`prompt_tail`: the last few prompt tokens; text goes on where they end, as `decode(prompt + ids)` would."""
    kind = ByteDetokenizer if vocabulary.exact else WindowDetokenizer
    return kind(vocabulary, skip_special_tokens=skip_special_tokens, prompt_tail=prompt_tail)


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes: a table and an incremental UTF-8 decoder.

    Broken UTF-8 becomes what `Tokenizer.decode` makes of it, with one exception: SentencePiece's byte fallback gives up whole runs of byte
    tokens, good characters included, when one byte of the run is bad. Characters that were complete stay here, since
    they may have been sent long ago.
    """

    __slots__ = ("_bytes", "_errors", "_pending", "_strip", "_texts")

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()) -> None:
        self._bytes = vocabulary.bytes(skip_special_tokens=skip_special_tokens)
        self._texts = self._bytes.text
        self._errors = vocabulary.errors
        self._strip = 0 if prompt_tail else vocabulary.strips_left
        tail = b"".join([self._bytes[token_id] for token_id in prompt_tail])
        self._pending = tail[utf_8_decode(tail, "replace", False)[1] :]

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._pending:
            text = self._texts[token_ids[0]]
            if text is not None:
                return self._stripped(text) if self._strip else text
        table = self._bytes
        data = self._pending + b"".join([table[token_id] for token_id in token_ids])
        text, used = utf_8_decode(data, self._errors, False)
        self._pending = data[used:]
        return self._stripped(text) if self._strip else text

    def flush(self) -> str:
        text = utf_8_decode(self._pending, self._errors, True)[0]
        self._pending = b""
        return self._stripped(text) if self._strip else text

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


class WindowDetokenizer:
    """For any other decoder: decodes a short window of recent tokens twice, with and without the newest one.

    Much dearer than the table. A decoder that looks further back than the last word printed is beyond it.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special_tokens: bool = True, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer: Tokenizer = vocabulary.tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_tail)
        self._read = len(self._ids)
        """Ids before this one were printed; they stay in the window so that spaces between words come out right."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token_id) for token_id in token_ids])

    def flush(self) -> str:
        before, now = self._decode(self._ids[: self._read]), self._decode(self._ids)
        self._read = len(self._ids)
        return now[len(before) :]

    def _step(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, now = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return now[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
