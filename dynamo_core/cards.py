"""The model card: everything that a frontend must know to serve a model that it has never seen.

A worker publishes its card in discovery at `v1/models/<ns>/<component>/<endpoint>/<id>`. Large parts (the tokenizer) are not in the
record: they are artifacts, named by digest, that the worker serves over the request plane and frontends cache on disk.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from dynamo_core.types import Sampling

Role = Literal["aggregated", "prefill", "decode", "encode"]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


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


class Handover(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How a worker hands KV blocks over, or takes them. `docs/decisions` has both protocols."""

    protocol: Literal["prefill-first", "bootstrap"] = "prefill-first"
    """`prefill-first`: prefill answers, and its answer travels to decode. `bootstrap`: both get the request at once, and meet by a number."""
    meeting_point: dict[str, Any] = {}
    """Of a prefill worker with `bootstrap`: what a decode worker needs to find it."""
    decode_alone: bool = True
    """Of a decode worker with `bootstrap`: it can read a prompt by itself."""
    terms: dict[str, str | int] = {}
    """What both sides must agree on, by name (`tensor_parallel`, `kv_layout`); what only one of them names is not compared."""


class Pooling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Of a model that answers with a vector: what the vector means."""

    labels: tuple[str, ...] = ()
    """Of a classifier, one for each place of the vector."""
    score: Literal["cosine", "pair", "joined"] | None = None
    """How two texts get a score. `cosine`: the angle between their vectors. `pair`: the vector of both, in the tokenizer's form for pairs.
    `joined`: the vector of both, one after the other. `None`: they get none."""
    segments: bool = False
    """With `pair`: the model is told where the second text begins."""


class ModelCard(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What an engine says about the model that it serves."""

    name: str
    aliases: tuple[str, ...] = ()
    role: Role = "aggregated"
    needs: tuple[tuple[Role, ...], ...] = ()
    """Alternatives, each a set of roles that must be present besides this one. Empty: needs nobody."""
    surfaces: tuple[str, ...] = ("chat", "completions")
    """Which API families the model answers: `chat`, `completions`, `embeddings`, `classify`, `score`, ..."""
    image_placeholder: str | None = None
    """Of a model that sees (capability `media`): what stands for an image where the chat template takes text only; empty where nothing does."""
    pooling: Pooling | None = None
    """Of a model that answers with vectors."""
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

    block_size: Positive = 16
    """Tokens in one KV block."""
    total_blocks: Natural | None = None
    max_sequences: Natural | None = None
    max_batched_tokens: Natural | None = None
    dp_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1
    dp_start: Natural = 0
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
    handover: Handover = Handover()
    """Of prefill and decode workers."""
    runtime: dict[str, Any] = {}

    def checksum(self) -> str:
        """Digest of what must agree between workers of one model: what the frontend renders and tokenizes with.

        Two cards of one name with different checksums would answer the same prompt differently, so only one of
        them is served and the other is reported.
        """
        parts = (self.tokenizer.digest if self.tokenizer else "", self.chat_template or "", repr(self.template_tokens),
                 repr(self.eos_token_ids), str(self.add_bos), str(self.block_size))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def mismatch(one: ModelCard, other: ModelCard) -> str | None:
    """Why a prefill and a decode worker cannot hand KV blocks over, or `None` when they can."""
    mine, theirs = one.handover, other.handover
    pairs = [("block size", one.block_size, other.block_size), ("protocol", mine.protocol, theirs.protocol)]
    pairs += [(name.replace("_", " "), mine.terms[name], theirs.terms[name]) for name in sorted(mine.terms.keys() & theirs.terms.keys())]
    differing = [f"{name} is {a} here and {b} there" for name, a, b in pairs if a != b]
    return ", ".join(differing) or None
