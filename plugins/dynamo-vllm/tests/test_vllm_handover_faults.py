"""Hand-overs that go wrong end, and say so: a side channel that cannot be opened, a prefill worker that stops between its answer and the transfer."""

from __future__ import annotations

import asyncio
import importlib.util
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import pytest

from dynamo_core.engines import EngineContext

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio,
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: pip install --no-deps nixl nixl-cu12"),
]


async def test_an_engine_whose_port_is_taken_while_it_loads_does_not_start_and_does_not_hang(
        make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    before = set(multiprocessing.active_children())
    with socket.create_server(("127.0.0.1", 0)) as thief:
        port = thief.getsockname()[1]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", port))
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
        engine = make_engine(role="prefill")
        starting = asyncio.create_task(engine.start(EngineContext()))
        while not set(multiprocessing.active_children()) - before:
            await asyncio.sleep(0.01)
        thief.listen()
        with pytest.raises(RuntimeError, match="Engine core initialization failed"):
            async with asyncio.timeout(60):
                await starting
