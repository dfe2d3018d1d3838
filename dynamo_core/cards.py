"""The model card: everything that a frontend must know to serve a model that it has never seen.

A worker publishes its card in discovery at `v1/models/<ns>/<component>/<endpoint>/<id>`. Large parts (the tokenizer) are not in the
record: they are artifacts, named by digest, that the worker serves over the request plane and frontends cache on disk.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from dynamo_core.types import Sampling

Role = Literal["aggregated", "prefill", "decode", "encode"]


class Artifact(msgspec.Struct, frozen=True):
    """A file that the worker serves by digest, so that no shared disk is needed."""

    name: str
    digest: str
    """SHA-256, hex."""
    size: int
    """Bytes."""

    @classmethod
    def of(cls, name: str, content: bytes) -> Artifact:
        return cls(name, hashlib.sha256(content).hexdigest(), len(content))


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an engine says about the model that it serves."""

    name: str
    aliases: tuple[str, ...] = ()
    role: Role = "aggregated"
    needs: tuple[tuple[Role, ...], ...] = ()
    """Alternatives, each a set of roles that must be present besides this one. Empty: needs nobody."""
    surfaces: tuple[str, ...] = ("chat", "completions")
    """Which API families the model answers: `chat`, `completions`, `embeddings`, ..."""
    context_length: int = 8192
    """Prompt plus output, in tokens."""
    vocab_size: int | None = None
    """Token ids at or above this are refused before they reach the engine."""
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: Artifact | None = None
    """A `tokenizer.json`."""
    chat_template: str | None = None
    """Jinja source."""
    template_tokens: dict[str, str] = {}
    """`bos_token`, `eos_token`, ... as the template may use them."""
    add_bos: bool = False
    """Whether plain completions prompts get the tokenizer's special tokens (chat templates write their own)."""
    defaults: Sampling = Sampling()
    """The model's recommended sampling, from its generation config."""
    default_max_tokens: int | None = None

    block_size: int = 16
    """Tokens in one KV block."""
    total_blocks: int | None = None
    max_sequences: int | None = None
    max_batched_tokens: int | None = None
    dp_size: int = 1
    dp_start: int = 0
    kv_events: bool = False
    """The worker publishes what its KV cache stores and removes."""
    capabilities: tuple[str, ...] = ()
    """Of `logprobs`, `prompt_logprobs`, `guided`, `logit_bias`, `n`, `lora`, `embeddings`, ...; a request that needs one that is missing is refused."""
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    adapter: str | None = None
    taints: tuple[str, ...] = ()
    engine: str = ""
    """Name and version of the engine, for people."""
    runtime: dict[str, Any] = {}

    def checksum(self) -> str:
        """Digest of what must agree between workers of one model: what the frontend renders and tokenizes with.

        Two cards of one name with different checksums would answer the same prompt differently, so only one of
        them is served and the other is reported.
        """
        parts = (self.tokenizer.digest if self.tokenizer else "", self.chat_template or "", repr(self.template_tokens),
                 repr(self.eos_token_ids), str(self.add_bos), str(self.block_size))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
