"""Text to token ids: cheap for what was seen before, and never stalling the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from threading import Lock
from typing import Any

from tokenizers import Tokenizer

from dynamo_core.preprocess.pieces import Cutter, Definition

INLINE = 4_000
"""Characters up to which tokenizing at once (a millisecond at worst) is cheaper than a thread."""
CACHE_BYTES = 48 * 2**20
"""Texts and tokens that one tokenizer remembers."""
WORDS = 50_000
"""Words whose tokens one tokenizer remembers: about 12 MB. Past that it starts anew; a language's common words are back within a few prompts."""
NEW_WORDS = 1_000
"""Words that one text may add: each is a text of its own for the tokenizer, and unpacking its answer holds the interpreter lock."""
LONG_WORD = 64
"""Characters of a word that is not worth remembering."""

threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="dynamo-text")
"""For long prompts. One pool for all models: more threads than cores would only add to the latency of each."""

Encode = Callable[[list[str]], list[list[int]]]
log = logging.getLogger(__name__)


class TextTokenizer:
    """A `tokenizer.json`. Construct it in a thread: parsing a large one takes a second."""

    def __init__(self, content: bytes, definition: Definition, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.reference = Tokenizer.from_buffer(content)
        self.reference.no_truncation()
        self.reference.no_padding()
        self._before, self._after = _added_around(self.reference)
        self._encode: Encode = _accelerated(content, self._encode_reference) or self._encode_reference
        self._cutter = Cutter(definition)
        self._words: dict[str, Sequence[int]] = {}
        """Tokens of a space and the word. Entries are never removed, so that threads may share it; the whole is replaced when it is full."""
        self._firsts: dict[str, Sequence[int]] = {}
        """The same for what pieces start with, without a space."""
        self._cache = _Cache(cache_bytes)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE:
            ids = self.encode_now(text)
        else:
            ids = await asyncio.get_running_loop().run_in_executor(threads, self.encode_now, text)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_now(self, text: str) -> list[int]:
        """The tokens of `text`, without special tokens around it, in this thread."""
        pieces = list(self._cutter.cut(text))
        known, missing = self._cache.get(pieces)
        if missing:
            fresh = {piece: array("I", ids) for piece, ids in zip(missing, self._by_words(missing), strict=True)}
            self._cache.put(fresh)
            known |= fresh
        ids: list[int] = []
        for piece in pieces:
            ids.extend(known[piece])
        return ids

    def _by_words(self, pieces: list[str]) -> list[list[int]]:
        """The tokens of each piece, made of those of its words wherever that is exact: most words of a new text were in an older one."""
        if len(self._words) + len(self._firsts) > WORDS:
            self._words, self._firsts = {}, {}
        known, firsts = self._words, self._firsts
        new: set[str] = set()
        texts: list[str] = []
        plans: list[tuple[str, list[str]]] = []
        """For each piece, the text that it starts with and the words after that."""
        for piece in pieces:
            words = self._cutter.split(piece)
            if words is not None:
                unknown = set(words[1:]).difference(known, new)
                if len(unknown) + len(new) > NEW_WORDS or any(len(word) > LONG_WORD for word in unknown):
                    words = None
                else:
                    new |= unknown
            first = piece if words is None else words[0]
            if first not in firsts:
                texts.append(first)
            plans.append((first, [] if words is None else words[1:]))
        begun: dict[str, Sequence[int]] = {}
        if texts or new:
            fresh = list(new)
            # All in one call: each return from a thread may have to wait for the interpreter lock.
            encoded = self._encode([*texts, *(" " + word for word in fresh)])
            known.update(zip(fresh, map(tuple, encoded[len(texts) :]), strict=True))
            begun.update(zip(texts, encoded[: len(texts)], strict=True))
            firsts.update((text, tuple(ids)) for text, ids in begun.items() if len(text) <= LONG_WORD)
        starts = ((begun[first] if first in begun else firsts[first], words) for first, words in plans)
        return [list(chain(start, chain.from_iterable(map(known.__getitem__, words)))) for start, words in starts]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.reference.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_pair(self, text: str, second: str) -> tuple[list[int], int | None]:
        """Two texts as the tokenizer's post-processor joins them, and where the second begins, if it marks that."""
        encoding = self.reference.encode_batch_fast([(text, second)], add_special_tokens=True)[0]
        return encoding.ids, encoding.type_ids.index(1) if 1 in encoding.type_ids else None

    def _encode_reference(self, texts: list[str]) -> list[list[int]]:
        # `encode` would hold the interpreter lock all the while, in whatever thread it runs; this lets it go.
        return [encoding.ids for encoding in self.reference.encode_batch_fast(texts, add_special_tokens=False)]


class _Cache:
    """The most recently used pieces, up to a number of bytes. Safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._pieces: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = Lock()

    def get(self, pieces: Iterable[str]) -> tuple[dict[str, array[int]], list[str]]:
        """Those of the pieces that are here, and the others, each once."""
        known: dict[str, array[int]] = {}
        missing: dict[str, None] = {}
        with self._lock:
            for piece in pieces:
                found = self._pieces.get(piece)
                if found is None:
                    missing[piece] = None
                else:
                    self._pieces.move_to_end(piece)
                    known[piece] = found
        return known, list(missing)

    def put(self, pieces: Mapping[str, array[int]]) -> None:
        with self._lock:
            for piece, ids in pieces.items():
                size = _bytes(piece, ids)
                if size > self._limit // 8 or piece in self._pieces:
                    continue
                self._pieces[piece] = ids
                self._size += size
            while self._size > self._limit:
                self._size -= _bytes(*self._pieces.popitem(last=False))


def _bytes(piece: str, ids: array[int]) -> int:
    return piece.__sizeof__() + ids.__sizeof__() + 100  # and an entry of the dictionary


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [n for n, special in enumerate(encoding.special_tokens_mask) if not special]
    if not own:  # the vocabulary has no "a"
        return encoding.ids, []
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


# ------------------------------------------------------------------ the accelerator


def _accelerated(content: bytes, reference: Encode) -> Encode | None:
    """`fastokens`, where it is installed and gives the same tokens as `tokenizers` on a page of awkward text."""
    try:
        import fastokens  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        fast = fastokens.Tokenizer.from_json_str(content.decode())
        samples = _samples()
        for sample, ids, expected in zip(samples, _encode_fast(fast, samples), reference(samples), strict=True):
            if ids != expected:
                raise ValueError(f"its tokens differ for {sample!r}")
    except Exception as error:
        log.warning("fastokens is not used for this tokenizer", extra={"reason": str(error)})
        return None

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            return _encode_fast(fast, texts)
        except Exception:  # its patterns have limits on backtracking; the reference has none
            return reference(texts)

    return encode


def _encode_fast(fast: Any, texts: list[str]) -> list[list[int]]:
    return [list(encoding.ids) for encoding in fast.encode_batch(texts)]


def _samples() -> list[str]:
    parts = ["Hello", " world", "  ", "\n", "\n\n", "\t", "\r\n", " I'll", "'S", "don't", "12", "34567", "3.14", "été", "e\u0301", "naïve", "你好", "世界",
             "こんにちは", "안녕", "\u1112\u1161\u11ab", "مرحبا", "नमस्ते", "😀", "👨\u200d👩\u200d👧", "🇫🇷", "\u200b", "\u00a0", "\ufeff", "\u2028", "\0", "_",
             "__init__", "(x)", "==", "{}", "</s>", "<s>", "<|im_end|>", "<|", "|>", "…", "—", "A", "ABC", "CamelCase", "ﬁ", "①", "½", ".", "!!!",
             "http://", "x" * 40, " " * 17, "▁", "<0x0A>", "Ω"]
    dice = random.Random(0)
    return ["", *parts, *("".join(dice.choices(parts, k=dice.randrange(2, 40))) for _ in range(300))]
