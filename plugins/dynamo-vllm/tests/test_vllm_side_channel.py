"""The port of NIXL's handshake is an engine's own from the moment when it is chosen, and what goes wrong with it is said."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from dynamo_core.errors import ConfigError
from dynamo_vllm import orphan, side_channel

_IP_LOCAL_PORT_RANGE = 51
"""Linux 6.3: which ports a socket may be given."""


def config(ranks: int = 1, *, first: int = 0, lends: bool = False) -> Any:
    parallel = SimpleNamespace(data_parallel_rank=first, data_parallel_size_local=ranks, node_rank_within_dp=int(lends))
    return SimpleNamespace(kv_transfer_config=object(), parallel_config=parallel)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(side_channel.HOST, "127.0.0.1")
    monkeypatch.delenv(side_channel.PORT, raising=False)


def chosen() -> int:
    return int(os.environ[side_channel.PORT])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def listening(port: int, host: str = "127.0.0.1") -> Any:
    """As vLLM does."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"tcp://{host}:{port}")
        yield


def who_wants_any_and_may_have(port: int) -> socket.socket:
    found = socket.socket()
    try:
        found.setsockopt(socket.IPPROTO_IP, _IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
    except OSError:
        found.close()
        pytest.skip("this kernel cannot narrow the ports that one socket may be given")
    return found


@pytest.mark.parametrize("reuse", [False, True])
def test_nobody_is_given_the_port_before_the_engine_listens_there(reuse: bool) -> None:
    with side_channel.reserve(config()):
        with who_wants_any_and_may_have(chosen()) as other, pytest.raises(OSError, match="Address already in use"):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            other.bind(("127.0.0.1", 0))
        with listening(chosen()):
            pass
        port = chosen()
    with who_wants_any_and_may_have(port) as other:
        other.bind(("127.0.0.1", 0))
        assert other.getsockname()[1] == port, "the narrow range gives the port to whoever asks, once it is free"


def test_the_engine_keeps_its_port_when_the_reservation_ends() -> None:
    with contextlib.ExitStack() as stack:
        with side_channel.reserve(config()):
            port = chosen()
            stack.enter_context(listening(port))
        assert side_channel.PORT not in os.environ
        with pytest.raises(ConfigError, match="in use"):
            os.environ[side_channel.PORT] = str(port)
            side_channel.reserve(config())


def test_each_rank_of_this_node_has_a_port_and_two_engines_share_none() -> None:
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            engine = stack.enter_context(contextlib.ExitStack())
            engine.enter_context(side_channel.reserve(config(3, first=2)))
            ports += [chosen() + rank for rank in (2, 3, 4)]
            del os.environ[side_channel.PORT]
        for port in ports:
            stack.enter_context(listening(port))
    assert len(set(ports)) == len(ports) == 60


def test_an_engine_without_hand_over_and_a_node_that_lends_its_devices_need_no_port() -> None:
    for without in (SimpleNamespace(kv_transfer_config=None, parallel_config=config().parallel_config), config(lends=True)):
        with side_channel.reserve(without):
            assert side_channel.PORT not in os.environ


def test_a_port_that_the_operator_chose_and_somebody_has_is_an_error_with_a_remedy() -> None:
    port = free_port()
    os.environ[side_channel.PORT] = str(port)
    with side_channel.reserve(config(2)):
        assert chosen() == port
    with listening(port + 1), pytest.raises(ConfigError) as caught:
        side_channel.reserve(config(2))
    assert f"127.0.0.1:{port + 1} (VLLM_NIXL_SIDE_CHANNEL_HOST, VLLM_NIXL_SIDE_CHANNEL_PORT): Address already in use" in str(caught.value)
    assert "leave VLLM_NIXL_SIDE_CHANNEL_PORT out" in str(caught.value)
    assert chosen() == port, "what the operator said stays"


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_of_this_machine_is_an_error_with_a_remedy(host: str) -> None:
    os.environ[side_channel.HOST] = host
    with pytest.raises(ConfigError, match=rf"cannot be opened at {host} \(VLLM_NIXL_SIDE_CHANNEL_HOST\)"):
        side_channel.reserve(config())


def test_an_address_of_version_six_will_do() -> None:
    os.environ[side_channel.HOST] = "::1"
    with side_channel.reserve(config()), zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.IPV6, 1)
        router.bind(f"tcp://[::1]:{chosen()}")


CORE = """
import threading, time
from dynamo_vllm import side_channel
side_channel.end_with_listener()
def end(): raise OSError("Address already in use")
thread = threading.Thread(target=end, name={name!r}); thread.start(); thread.join()
print("goes on", flush=True)
"""


def core(name: str, worker: int) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, orphan.MARK: str(worker), side_channel.PORT: "5600"}
    return subprocess.run([sys.executable, "-c", CORE.format(name=name)], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_an_engine_core_ends_with_the_thread_that_answers_handshakes() -> None:
    ended = core("nixl_handshake_listener", worker=os.getpid())
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "side channel at 127.0.0.1:5600 (and its rank added) broke, and this engine core ends: Address already in use" in ended.stderr
    assert "Traceback" in ended.stderr


def test_other_threads_end_alone() -> None:
    assert core("another", worker=os.getpid()).stdout == "goes on\n"


def test_a_process_that_is_no_engine_core_of_ours_does_not_end() -> None:
    program = CORE.format(name="nixl_handshake_listener")
    environment = {name: value for name, value in os.environ.items() if name != orphan.MARK}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False).stdout == "goes on\n"
