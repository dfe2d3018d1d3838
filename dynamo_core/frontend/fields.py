"""The request bodies that clients send, as typed structs. Ranges are part of the types, so decoding checks them.

`None` always means "not given": client libraries send explicit nulls.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]
Top = Annotated[int, Meta(ge=0, le=20)]
Unsigned = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Milliseconds = Annotated[float, Meta(gt=0, le=1e9)]
StopText = Annotated[str, Meta(min_length=1, max_length=1024)]

Annotation = Literal["request_id", "worker", "decision", "timing", "token_ids", "prompt_token_ids", "formatted_prompt"]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    """One more chunk at the end, with usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Usage in every chunk."""
    include_obfuscation: bool | None = None
    """Ignored: chunks are never padded."""


class Targets(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where NVIDIA Dynamo's clients put the two targets, in milliseconds."""

    ttft_target: Milliseconds | None = None
    itl_target: Milliseconds | None = None


class Extension(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The object `dynamo` (or `nvext`) of a request: what OpenAI's API has no words for. Headers beat it."""

    annotations: Annotated[list[Annotation], Meta(max_length=16)] = []
    """What to report in the `dynamo` object of the answer (of a stream: in its last chunk)."""
    cache_salt: Name | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    session: Name | None = None
    instance: Unsigned | None = None
    """Pin: this instance and no other."""
    prefill_instance: Unsigned | None = None
    dp_rank: Annotated[int, Meta(ge=0, lt=2**16)] | None = None
    dry_run: bool = False
    """Route only: the answer is the decision record."""
    token_ids: list[TokenId] | None = None
    """The prompt, already tokenized: replaces template and tokenizer."""
    use_raw_prompt: bool = False
    """Chat: the contents of the messages, joined, are the prompt; no template."""
    expected_output_tokens: Count | None = None
    ttft_target_ms: Milliseconds | None = None
    itl_target_ms: Milliseconds | None = None
    router: Targets | None = None
    """Another place for the two targets; those above win."""
    required_taints: Annotated[list[Name], Meta(max_length=64)] = []
    preferred_taints: Annotated[dict[str, float], Meta(max_length=64)] = {}
    policy_class: Name | None = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] = {}
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and plain completions have in common."""

    model: Name

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None

    stop: StopText | Annotated[list[StopText | TokenId], Meta(max_length=64)] | None = None
    """Strings, or token ids; not both in one list."""
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None

    prompt_logprobs: Top | None = None

    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Annotated[str, Meta(min_length=1, max_length=65536)] | None = None
    guided_grammar: Annotated[str, Meta(min_length=1, max_length=262144)] | None = None
    guided_choice: Annotated[list[StopText], Meta(min_length=1, max_length=4096)] | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Name | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    dynamo: Extension | None = None
    nvext: Extension | None = None
    """The older name of `dynamo`."""

    # Accepted and ignored: they change nothing that a server of open models could honour, and client libraries send them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=0, lt=2**31)] | None = None
    """Beats `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    chat_template: Annotated[str, Meta(min_length=1, max_length=262144)] | None = None
    chat_template_args: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """The other name of `chat_template_args`."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    reasoning_effort: Name | None = None
    """Handed to the chat template."""
    modalities: list[str] | None = None

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None


class EmbeddingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/embeddings`."""

    stream: ClassVar[None] = None
    stream_options: ClassVar[None] = None

    model: Name
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    cache_salt: Name | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    dynamo: Extension | None = None
    nvext: Extension | None = None
    user: str | None = None


Texts = str | Annotated[list[str], Meta(min_length=1, max_length=2048)]


class PoolingBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the families of classifiers have in common."""

    stream: ClassVar[None] = None
    stream_options: ClassVar[None] = None

    model: Name
    use_activation: bool | None = None
    """Off: logits instead of probabilities."""
    cache_salt: Name | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    dynamo: Extension | None = None
    nvext: Extension | None = None
    user: str | None = None


class ClassifyBody(PoolingBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/classify`."""

    input: str | list[str | TokenId | list[TokenId]]


class ScoreBody(PoolingBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/score`: one pair of fields, under any of its names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankBody(PoolingBody, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/rerank`."""

    query: str
    documents: Texts
    top_n: Unsigned = 0
    """Only the best so many; 0 is all."""
    return_documents: bool | None = None
    """Off: without their texts."""


class CompletionBody(Body, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | TokenId | list[TokenId]]
    logprobs: Top | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
