"""Text to token ids without stalling the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer

INLINE = 2_000
"""Characters up to which tokenizing at once (about a millisecond at worst) is cheaper than a thread."""

threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="dynamo-text")
"""For long prompts. One pool for all models: more threads than cores would only add to the latency of each."""


class TextTokenizer:
    """A `tokenizer.json`. Construct it in a thread: parsing a large one takes a second."""

    def __init__(self, content: bytes) -> None:
        self.reference = Tokenizer.from_buffer(content)
        self.reference.no_truncation()
        self.reference.no_padding()
        self._before, self._after = _added_around(self.reference)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE:
            ids = self._encode(text)
        else:
            ids = await asyncio.get_running_loop().run_in_executor(threads, self._encode, text)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def _encode(self, text: str) -> list[int]:
        # Tokenizer.encode would hold the interpreter lock all the while; this lets it go.
        return self.reference.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.reference.decode(token_ids, skip_special_tokens=skip_special_tokens)


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [n for n, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
