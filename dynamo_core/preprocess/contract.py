"""Between text and tokens: what the frontend needs to serve one model.

    P1  Rendering a template gives byte for byte what `transformers.apply_chat_template` gives; a template error is the
        client's `RequestError`, never a crash; templates run in a sandbox, bounded in time and output.
    P2  Tokenizing never stalls the event loop for more than a few milliseconds, whatever the length of the text.
    P3  Incremental text, joined, equals decoding all tokens at once, for any chunking; no character is ever split and
        no replacement character appears early.
    P4  A stop string ends the text at its first match, for any chunking; text that may yet become one is held back, and
        released unharmed at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dynamo_core.cards import ModelCard
from dynamo_core.types import Delta, LogprobText, Output, TextOptions


@runtime_checkable
class Assembler(Protocol):
    """Turns the outputs of one choice into deltas: incremental text, stop strings, logprobs. Not thread-safe."""

    stopped: bool
    """A stop string was found: the caller cancels the stream; later outputs are ignored."""

    def push(self, output: Output, into: Delta | None = None) -> Delta | None:
        """The delta that this output adds (merged into `into` when given), or `None` when there is nothing to say yet."""
        ...


@runtime_checkable
class Preprocessor(Protocol):
    async def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
                     add_generation_prompt: bool = True, continue_final_message: bool = False, template: str | None = None,
                     arguments: Mapping[str, Any] | None = None) -> str:
        """Messages to prompt text. :raises RequestError: the template refuses these messages."""
        ...

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to token ids."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def assembler(self, options: TextOptions, *, index: int = 0, prompt_tail: Sequence[int] = ()) -> Assembler:
        """For one choice. `prompt_tail`: the last few prompt tokens, so that the first text joins on as it should."""
        ...

    def logprob(self, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()) -> LogprobText: ...


@runtime_checkable
class FollowsCard(Protocol):
    """A preprocessor that refuses what is too long before it is tokenized. Optional."""

    card: ModelCard
    """Of the model, with the context length of its workers as they come and go."""


@runtime_checkable
class EncodesPairs(Protocol):
    """A preprocessor that knows its tokenizer's form for two texts. Optional: models that score pairs need it."""

    async def encode_pair(self, text: str, second: str) -> tuple[list[int], int | None]:
        """Both texts as one prompt, and where the second begins where the tokenizer tells them apart."""
        ...
