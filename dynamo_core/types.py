"""What travels between frontend, router and worker: requests, outputs, instances.

These are msgspec structs because they cross the wire once per engine step; decoding one costs well under a
microsecond. Token ids are plain ints; times are seconds unless a name says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error", "tool_calls", "content_filter"]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the next token is drawn. `None` means the model's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: int = 1


class Stops(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """When generation ends. Stop *strings* are found by the frontend, which then cancels the stream."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Besides the model's own end-of-sequence ids."""
    ignore_eos: bool = False


class Guided(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A constraint on the output; exactly one field is set."""

    json_schema: dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None


class Hints(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What the caller wants of the router. Nothing here changes the generated text."""

    priority: int = 0
    """Higher is more urgent."""
    session: str | None = None
    instance: int | None = None
    """Pin: this instance and no other."""
    prefill_instance: int | None = None
    dp_rank: int | None = None
    expected_output_tokens: int | None = None
    ttft_target_ms: float | None = None
    itl_target_ms: float | None = None
    required_taints: tuple[str, ...] = ()
    preferred_taints: dict[str, float] = {}
    policy_class: str | None = None


class Request(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One generation, token in, token out. The frontend has rendered and tokenized it already."""

    id: str
    model: str
    token_ids: list[int]
    """The prompt, then `resumed` tokens that an earlier worker generated for this same request.

    `max_tokens` and `min_tokens` count from here on: whoever resumes a request has already taken off what was generated.
    """
    resumed: int = 0
    sampling: Sampling = Sampling()
    stops: Stops = Stops()
    logprobs: int | None = None
    """`None`: no logprobs. `k`: of the chosen token and of the k best."""
    prompt_logprobs: int | None = None
    guided: Guided | None = None
    hints: Hints = Hints()
    adapter: str | None = None
    """Name of a LoRA adapter."""
    cache_salt: str | None = None
    """Requests share cached KV blocks only with requests of the same salt."""
    transfer: dict[str, Any] | None = None
    """Hand-off between prefill and decode workers, opaque to everyone but the engines."""
    media: list[dict[str, Any]] | None = None
    """Images, in the order of the prompt: `type`, `mime`, `digest` (of the content), `start` and `length` (the prompt tokens that depend on it), and `data`
    (bytes), or `encoded` where an encode worker has them: that is between the engines. `runs`, where an engine has told it before: as in `Output.places`."""
    extra: dict[str, Any] = {}
    """Engine-specific options by engine name."""
    activation: bool | None = None
    """Of a classifier: whether its logits become probabilities. `None`: as the model has it."""
    second_text: int | None = None
    """Where the second of two texts begins, for models that tell them apart."""


class TokenLogprob(msgspec.Struct, array_like=True, gc=False):
    """Natural-log probability of one position: the chosen token and the best alternatives, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Output(msgspec.Struct, array_like=True, gc=False):
    """What one engine step added to one stream. `token_ids` holds only the new tokens, in order.

    The last output of a choice carries `finish_reason`. Positional on the wire: only ever append fields.
    """

    token_ids: list[int] = []
    index: int = 0
    """Which of the `n` choices."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id that ended the choice, when one did and it was not an end-of-sequence id."""
    logprobs: list[TokenLogprob] | None = None
    """One entry for each new token, when they were asked for."""
    cached_tokens: int | None = None
    """Prompt tokens that the engine took from its cache; on the first output of a request."""
    transfer: dict[str, Any] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: list[float] | None = None
    places: list[list[int]] | None = None
    """With the first `cached_tokens` of a request with images: for each of them, what stands in the engine's prompt in place of the token at its `start`, as
    runs: token, how often, next token, how often, ... Left out where the engine cannot tell, and where the request says the same."""


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An engine's own word on how busy it is. Published on the event plane topic `load`."""

    running: int = 0
    """Sequences that are being decoded or prefilled now."""
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    waiting_prefill_tokens: int = 0
    dp_rank: int = 0


class Instance(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One served endpoint of one process. Lives in discovery at `v1/instances/<ns>/<component>/<endpoint>/<id>`."""

    id: int
    """The lease id of the process: all its endpoints share it, and a restarted process has a new one."""
    namespace: str
    component: str
    endpoint: str
    address: str
    """Where the request plane answers, as a URL: `tcp://10.0.0.3:41234`."""
    host: str = ""
    pid: int = 0
    started: float = 0.0
    """Unix time."""
    version: str = ""

    @property
    def path(self) -> str:
        """`namespace.component.endpoint`, the name that the request plane dispatches on."""
        return f"{self.namespace}.{self.component}.{self.endpoint}"

    @property
    def label(self) -> str:
        """A short name for people: component and the last digits of the id."""
        return f"{self.component}-{self.id & 0xFFFFFF:06x}"


# ------------------------------------------------------------------ text, on the frontend's side only


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What happens to generated tokens on their way to text."""

    stop: tuple[str, ...] = ()
    """Stop strings; the earliest match in the text ends the choice, wherever chunks were cut."""
    include_stop: bool = False
    """Leave the stop string in the text."""
    skip_special_tokens: bool = True
    logprobs: bool = False
    """Render logprobs with token text and bytes."""


class LogprobText(msgspec.Struct, gc=False):
    """One position as clients see it. `bytes` are the UTF-8 bytes of the token, which may be part of a character."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]
    top: list[LogprobText] = []


class Delta(msgspec.Struct, gc=False):
    """What one read added to one choice, as text. Several engine steps may be merged in one delta."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    """The new tokens behind the text; the text may lag behind them while a character or a stop string is incomplete."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[LogprobText] | None = None
    embedding: list[float] | None = None
    """Of a model that answers with a vector."""


class Usage(msgspec.Struct, gc=False):
    """Of the original request, counted once, whatever happened on the way."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
