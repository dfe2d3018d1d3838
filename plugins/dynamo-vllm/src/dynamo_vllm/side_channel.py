"""The port where an engine core answers NIXL's handshake: one for each rank, chosen before the core is started and bound by it when the model is loaded.

Whatever takes it in between, or an address that is another machine's, ends a thread of the core, for whose first sign vLLM waits without end. So the port is
kept from the moment when it is chosen (the core alone opens a dozen others by then), and the end of that thread is the end of the core.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from dynamo_core.errors import ConfigError, Problem
from dynamo_vllm import orphan

log = logging.getLogger(__name__)

HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
PORT = "VLLM_NIXL_SIDE_CHANNEL_PORT"
_TRIES = 100
_THREADS = "handshake_listener"
"""What vLLM's names of such threads end with."""


def reserve(config: Any) -> contextlib.ExitStack:
    """Keep a port for each rank of this node, and tell vLLM the first by the environment, until the stack is closed. Do that when the core has bound them.

    A rank adds its number to the port that the environment names.

    :raises ConfigError: the address is not one of this machine, or somebody has a port that the operator chose.
    """
    held = contextlib.ExitStack()
    parallel = config.parallel_config
    if config.kv_transfer_config is None or parallel.node_rank_within_dp > 0:
        return held
    host, given = os.environ.setdefault(HOST, "127.0.0.1"), os.environ.get(PORT)
    first, ranks = parallel.data_parallel_rank, parallel.data_parallel_size_local
    if given is not None:
        for rank in range(first, first + ranks):
            held.enter_context(_keep(host, int(given) + rank))
        return held
    ports = _next_to_each_other(host, ranks)
    for port in ports:
        held.enter_context(port)
    os.environ[PORT] = str(ports[0].getsockname()[1] - first)
    held.callback(os.environ.pop, PORT, None)
    return held


def _keep(host: str, port: int) -> socket.socket:
    """A port that the operator chose. One that an earlier engine has left a moment ago is free."""
    try:
        return _bound(host, port, shared=True)
    except OSError as e:
        raise ConfigError(Problem(f"NIXL's side channel cannot be opened at {host}:{port} ({HOST}, {PORT}): {e.strerror}",
                                  remedy=f"leave {PORT} out, and each engine takes a free port; or give each engine of this machine a port of its own "
                                         "(and as many after it as it has data-parallel ranks)")) from e  # fmt: skip


def _next_to_each_other(host: str, count: int) -> Sequence[socket.socket]:
    for _ in range(_TRIES):
        with contextlib.ExitStack() as stack:
            try:
                ports = [stack.enter_context(_bound(host, 0))]
            except OSError as e:
                raise ConfigError(Problem(f"NIXL's side channel cannot be opened at {host} ({HOST}): {e.strerror}",
                                          remedy=f"set {HOST} to an address of this machine that the other workers reach")) from e  # fmt: skip
            port = ports[0].getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                ports += [stack.enter_context(_bound(host, port + i)) for i in range(1, count)]
                stack.pop_all()
                return ports
    raise ConfigError(Problem(f"there are no {count} free ports next to each other for NIXL's side channel", remedy=f"choose the first of them with {PORT}"))


def _bound(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Bound, and not listening: whoever listens with SO_REUSEADDR, as ZeroMQ does, still can; nobody is given the port who asks for any.

    :param shared: take it even if another socket is bound to it, as long as nobody listens.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
        found.bind(address)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
    except BaseException:
        found.close()
        raise
    return found


def end_with_listener() -> None:
    """In an engine core, the end of the thread that answers handshakes is the end of the core. vLLM calls this in each of its processes.

    Nobody would miss the thread otherwise: a start would wait for it without end, and later every new decode worker would ask in vain.
    """
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs, /) -> None:
        before(args)
        worker = os.environ.get(orphan.MARK)
        if args.thread is None or not args.thread.name.endswith(_THREADS) or worker is None or int(worker) == os.getpid():
            return
        log.critical("NIXL's side channel at %s:%s (and its rank added) broke, and this engine core ends: %s", os.environ.get(HOST), os.environ.get(PORT),
                     args.exc_value)  # fmt: skip
        os._exit(1)

    threading.excepthook = hook
