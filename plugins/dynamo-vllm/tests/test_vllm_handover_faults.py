"""Hand-overs that go wrong end, and say so: a port that is taken, a prefill engine that stops or dies between its answer and the transfer."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from dynamo_core.context import Context
from dynamo_core.engines import EngineContext
from dynamo_core.types import Request, Sampling, Stops

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="needs nixl: pip install --no-deps nixl nixl-cu12"),
]

GUARD = 90.0
"""Seconds. Far more than any bound here, and far less than the test's."""


class Pair:
    """A prefill and a decode engine, without anybody between them."""

    def __init__(self, make_engine: Callable[..., Any]) -> None:
        self.prefill = make_engine(role="prefill")
        self.decode = make_engine(role="decode", fetch_timeout=3.0)
        self.core = 0

    async def start(self) -> None:
        before = set(multiprocessing.active_children())
        await self.prefill.start(EngineContext())
        (core,) = set(multiprocessing.active_children()) - before
        self.core = core.pid or 0
        await self.decode.start(EngineContext())

    async def read(self, prompt: list[int]) -> dict[str, Any]:
        """Where the blocks are."""
        transfer = None
        async with aclosing(self.prefill.generate(asked(prompt, 1), Context("read"))) as outputs:
            async for output in outputs:
                transfer = output.transfer or transfer
        assert transfer is not None
        return transfer

    async def say(self, prompt: list[int], transfer: dict[str, Any] | None = None) -> list[int]:
        tokens: list[int] = []
        async with asyncio.timeout(GUARD), aclosing(self.decode.generate(asked(prompt, 8, transfer), Context("say"))) as outputs:
            async for output in outputs:
                tokens += output.token_ids
        return tokens

    async def free(self) -> None:
        async with asyncio.timeout(GUARD):
            while self.decode._running._loads.used_blocks:
                await asyncio.sleep(0.05)

    def stop(self) -> None:
        os.kill(self.core, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.core, signal.SIGCONT)


def asked(prompt: list[int], tokens: int, transfer: dict[str, Any] | None = None) -> Request:
    stops = Stops(max_tokens=tokens, ignore_eos=True)
    return Request(id="r", model="tiny", token_ids=prompt, sampling=Sampling(temperature=0.0), stops=stops, transfer=transfer)


def prompt(first: int) -> list[int]:
    """150 tokens that nobody has in a cache: several blocks, the last one not full."""
    return [first + i for i in range(150)]


def given_up(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "are given up" in record.getMessage()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(make_engine: Callable[..., Any]) -> AsyncIterator[Pair]:
    pair = Pair(make_engine)
    await pair.start()
    yield pair
    with contextlib.suppress(ProcessLookupError):
        pair.go_on()
    await pair.decode.stop()
    await pair.prefill.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(make_engine: Callable[..., Any]) -> Callable[[int], list[int]]:
    engine = make_engine()
    await engine.start(EngineContext())
    said: dict[int, list[int]] = {}
    for first in (10, 200, 400, 600, 800):
        async with aclosing(engine.generate(asked(prompt(first), 8), Context("alone"))) as outputs:
            said[first] = [token async for output in outputs for token in output.token_ids]
    await engine.stop()
    assert len({tuple(tokens) for tokens in said.values()}) == len(said)
    return said.__getitem__


async def test_an_engine_whose_port_is_taken_while_it_loads_does_not_start_and_does_not_hang(
        make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    before = set(multiprocessing.active_children())
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", 0))
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(thief.getsockname()[1]))
        starting = asyncio.create_task(make_engine(role="prefill").start(EngineContext()))
        while not set(multiprocessing.active_children()) - before:
            await asyncio.sleep(0.01)
        thief.listen()
        with pytest.raises(RuntimeError, match="Engine core initialization failed"):
            async with asyncio.timeout(GUARD):
                await starting


async def test_a_prefill_engine_that_stops_before_the_first_handshake_is_not_waited_for(pair: Pair, expected: Any) -> None:
    transfer = await pair.read(prompt(10))
    pair.stop()
    try:
        assert await pair.say(prompt(10), transfer) == expected(10)
    finally:
        pair.go_on()
    await pair.free()


async def test_blocks_are_fetched(pair: Pair, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    transfer = await pair.read(prompt(200))
    assert await pair.say(prompt(200), transfer) == expected(200)
    assert not given_up(caplog)


async def test_a_prefill_engine_that_stops_before_the_transfer_is_given_up_and_decode_reads_the_prompt(
        pair: Pair, expected: Any, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    transfer = await pair.read(prompt(400))
    pair.stop()
    try:
        with caplog.at_level(logging.WARNING):
            assert await pair.say(prompt(400), transfer) == expected(400)
    finally:
        pair.go_on()
    (why,) = given_up(caplog)
    assert f"at 127.0.0.1:{transfer['remote_port']} are given up, because nothing has come from it for 3 s (fetch_timeout)" in why
    await pair.free()


async def test_a_prefill_engine_that_goes_on_is_fetched_from_again(pair: Pair, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    transfer = await pair.read(prompt(600))
    assert await pair.say(prompt(600), transfer) == expected(600)
    assert not given_up(caplog)


async def test_a_prefill_engine_that_dies_before_the_transfer_is_given_up_and_decode_reads_the_prompt(pair: Pair, expected: Any) -> None:
    transfer = await pair.read(prompt(800))
    os.kill(pair.core, signal.SIGKILL)
    assert await pair.say(prompt(800), transfer) == expected(800)
    await pair.free()
