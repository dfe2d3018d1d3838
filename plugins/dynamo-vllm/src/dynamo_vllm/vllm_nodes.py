"""The part of `vllm_api` for one engine on several nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from dynamo_core.errors import ConfigError, Problem
from dynamo_vllm import side_channel
from dynamo_vllm.nodes import Place
from dynamo_vllm.vllm_api import SUPPORTED, Vllm, attr, prepare


@attrs.frozen
class Processes:
    """Of a node without a head."""

    processes: Sequence[Any]
    end: Callable[[float], None]
    """Gently for so many seconds. Blocks."""


def place(config: Any) -> Place | None:
    """Where this node stands among those of its engine; `None` when it is the only one. :raises ConfigError: each node would have a head of its own."""
    parallel = config.parallel_config
    if parallel.local_engines_only:
        raise ConfigError(Problem("vLLM's external and hybrid load balancing, where each node has a head of its own, are not supported",
                                  remedy="give one node all of data_parallel_size, without a start rank, and make the other nodes headless"))  # fmt: skip
    spread = parallel.data_parallel_size_local < parallel.data_parallel_size or parallel.nnodes > 1
    if not spread or parallel.data_parallel_backend != "mp":
        return None
    host, port = parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port
    if parallel.nnodes > 1:
        host, port = parallel.master_addr, parallel.master_port
    lends = parallel.node_rank_within_dp > 0
    ranks = () if lends else tuple(range(parallel.data_parallel_rank, parallel.data_parallel_rank + parallel.data_parallel_size_local))
    return Place(host, port + 1, ranks, parallel.data_parallel_size, parallel.node_rank)


def launch_headless(vllm: Vllm, config: Any, start_method: str) -> Processes:
    """Start what a node without a head runs, as `vllm serve --headless` does. :raises ConfigError: this vLLM does it in another way."""
    prepare(start_method)
    parallel = config.parallel_config
    with side_channel.reserve(config) as reserved:
        try:
            executor_class = attr("vllm.v1.executor", "Executor").get_class(config)
            if parallel.node_rank_within_dp > 0:
                executor = executor_class(config, monitor_workers=False)
                return Processes([worker.proc for worker in executor.workers], lambda _: executor.shutdown())
            manager = attr("vllm.v1.engine.utils", "CoreEngineProcManager")(
                local_engine_count=parallel.data_parallel_size_local, start_index=parallel.data_parallel_rank, local_start_index=0, vllm_config=config,
                local_client=False, executor_class=executor_class, log_stats=True,
                handshake_address=attr("vllm.utils.network_utils", "get_tcp_uri")(parallel.data_parallel_master_ip, parallel.data_parallel_rpc_port),
            )  # fmt: skip
        except (ImportError, AttributeError, TypeError) as e:
            raise ConfigError(Problem(f"vLLM {vllm.version} has no headless nodes that this plugin can drive: {e}",
                                      remedy=f"install vLLM {SUPPORTED}.x")) from e  # fmt: skip
        ports = reserved.pop_all()  # nobody says here when the cores have bound them

    def end(seconds: float) -> None:
        ports.close()
        manager.shutdown(timeout=seconds)

    return Processes(manager.processes, end)


def kv_sources(engine: Any) -> dict[int, tuple[str, str]]:
    """By rank, where engine cores of other nodes publish KV events and where they replay them."""
    return {rank: (source.endpoint, source.replay_endpoint) for rank, source in engine.get_kv_event_sources().items()
            if source.replay_endpoint and not source.endpoint.startswith("ipc://")}  # fmt: skip
