"""What vLLM knows of its model, as a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from dynamo_core.cards import Artifact, Handover, ModelCard, Pooling, Role
from dynamo_core.errors import ConfigError, Problem
from dynamo_core.types import Sampling
from dynamo_vllm import vllm_api
from dynamo_vllm.vllm_api import Vllm

GENERATES = ("logprobs", "prompt_logprobs", "guided", "logit_bias", "n")


def name_of(model: str) -> str:
    """What clients call it: the id, or the last part of a path."""
    return Path(model).name if Path(model).exists() else model


def tokenizer_json(engine: Any) -> bytes:
    """:raises ConfigError: the model's tokenizer has no such form."""
    content = vllm_api.tokenizer_file(engine.vllm_config)
    if content is not None:
        return content
    backend = getattr(engine.get_tokenizer(), "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(Problem(f"the model {engine.vllm_config.model_config.model} has no tokenizer.json, and frontends need one",
                                  remedy="save the tokenizer in its fast form: AutoTokenizer.from_pretrained(model).save_pretrained(directory)"))  # fmt: skip
    return backend.to_str().encode()


def card_of(vllm: Vllm, engine: Any, tokenizer: bytes, *, kv_events: bool, lora: bool, role: str, task: str | None) -> ModelCard:
    """:param task: of a pooling model, as vLLM calls it. :raises ConfigError: nobody could ask for it."""
    config, tok = engine.vllm_config, engine.get_tokenizer()
    model, cache, scheduler, parallel = config.model_config, config.cache_config, config.scheduler_config, config.parallel_config
    pooling = None if task is None else _pooling(model, task, tok)
    template = _template(tok)
    images, placeholder = vllm_api.sees(engine)
    defaults: dict[str, Any] = model.get_diff_sampling_param()
    generates = ("chat", "completions") if template else ("completions",)
    return ModelCard(
        name=name_of(model.model),
        role=cast("Role", role),
        handover=Handover() if role in ("aggregated", "encode") else Handover(terms=vllm_api.handover_terms(vllm, config)),
        needs=(("prefill",),) if role == "decode" else (("decode",),) if role == "prefill" else (),
        surfaces=generates if pooling is None else (*_POOLS[task or ""], *(("score",) if pooling.score else ())),
        pooling=pooling,
        context_length=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        eos_token_ids=_ends(model, tok),
        tokenizer=Artifact.of("tokenizer.json", tokenizer),
        chat_template=template,
        template_tokens={name: str(text) for name, text in tok.special_tokens_map.items() if name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        add_bos=bool(tok.encode("")),
        defaults=Sampling(**{name: value for name, value in defaults.items() if name != "max_tokens"}),
        default_max_tokens=defaults.get("max_tokens"),
        block_size=cache.block_size,
        total_blocks=(cache.num_gpu_blocks or 0) // parallel.data_parallel_size or None,  # vLLM adds up what the ranks have
        max_sequences=scheduler.max_num_seqs,
        max_batched_tokens=scheduler.max_num_batched_tokens,
        dp_size=parallel.data_parallel_size,
        kv_events=kv_events,
        image_placeholder=placeholder if images else None,
        reasoning_parser=config.structured_outputs_config.reasoning_parser or None,
        capabilities=(*_capabilities(vllm, lora=lora), *(("media",) if images else ())) if pooling is None else _POOLS[task or ""],
        engine=f"vLLM {vllm.version}{' on CPU' if vllm.on_cpu else ''}",
    )


def of_headless(vllm: Vllm, config: Any, ranks: tuple[int, ...]) -> ModelCard:
    """Of a node that serves nobody; for its own process only."""
    return ModelCard(name=name_of(config.model_config.model), surfaces=(), dp_start=ranks[0] if ranks else 0, dp_size=len(ranks),
                     engine=f"vLLM {vllm.version}, without a head")  # fmt: skip


_POOLS = {"embed": ("embeddings",), "classify": ("classify",)}
"""What clients can ask of a pooling model, by vLLM's task."""


def _pooling(model: Any, task: str, tokenizer: Any) -> Pooling:
    if task == "embed":
        return Pooling(score="cosine")
    if task != "classify":
        raise ConfigError(Problem(f"the model {model.model} answers with {task!r}, for which there is no API here",
                                  remedy="vectors and classes are served: choose one by args.pooler_config = { task = ... }, if the model has it"))  # fmt: skip
    labels: dict[int, str] = getattr(model.hf_config, "id2label", None) or {}
    count: int = getattr(model.hf_config, "num_labels", 0)
    score = None if count != 1 else "pair" if model.use_sep_token else "joined"
    return Pooling(labels=tuple(labels[i] for i in sorted(labels)), score=score, segments="token_type_ids" in tokenizer.model_input_names)


def _capabilities(vllm: Vllm, *, lora: bool) -> tuple[str, ...]:
    if not lora:
        return GENERATES
    # vLLM 0.32 on CPU: a prompt whose logprobs are wanted while LoRA is enabled kills the engine core (shapes differ in `add_lora_logits`)
    return (*(name for name in GENERATES if name != "prompt_logprobs" or not vllm.on_cpu), "lora")


def _template(tokenizer: Any) -> str | None:
    template: Any = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's end of sequence, and what the generation config adds."""
    ends: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    more: Any = model.try_get_generation_config().get("eos_token_id")
    ends += [more] if isinstance(more, int) else list(more or ())
    return tuple(dict.fromkeys(ends))


def lora_rank(path: Path) -> int | None:
    """The rank that an adapter's own configuration names."""
    try:
        return json.loads((path / "adapter_config.json").read_bytes()).get("r")
    except (OSError, ValueError):
        return None
