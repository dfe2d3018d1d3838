"""Answers and connections, byte by byte."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_core.cards import ModelCard
from dynamo_core.errors import EngineDead, EngineFailed
from dynamo_core.types import Output, Request, Sampling
from dynamo_openai.answers import Reader, refusal
from dynamo_openai.connection import Connections, Lost
from dynamo_openai.requests import Requests
from dynamo_openai.server import loads_of

CARD = ModelCard(name="m", eos_token_ids=(0, 3))


def choice(index: int, tokens: list[int], reason: str | None = None, stop: int | None = None) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": "x", "token_ids": tokens, "finish_reason": reason, "stop_reason": stop}]}


ANSWER = b": keep-alive\n\n" + b"".join(
    b"data: " + json.dumps(event).encode() + end
    for event, end in (
        (choice(0, [5]), b"\n\n"), (choice(1, [6, 7]), b"\r\n\r\n"), (choice(0, [8], "length"), b"\n\n"), (choice(1, [], None), b"\n\n"), (choice(1, [3], "stop", 3), b"\n\n"),
        ({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 32}}}, b"\n\n"),
    )
) + b"data: [DONE]\n\n"  # fmt: skip


def reader(n: int = 2) -> Reader:
    return Reader(Request(id="r", model="m", token_ids=[1, 2], sampling=Sampling(n=n)), CARD)


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12))
@settings(max_examples=200)
def test_wherever_an_answer_is_cut_it_says_the_same(cuts: list[int]) -> None:
    read, outputs = reader(), list[Output]()
    edges = [0, *sorted(cuts), len(ANSWER)]
    for start, end in itertools.pairwise(edges):
        outputs += read.events(ANSWER[start:end])
    assert read.over
    for index, tokens, reason in ((0, [5, 8], "length"), (1, [6, 7, 3], "stop")):
        mine = [output for output in outputs if output.index == index]
        assert [token for output in mine for token in output.token_ids] == tokens
        assert [output.finish_reason for output in mine] == [None] * (len(mine) - 1) + [reason]
        assert mine[-1].stop_reason is None, "an end of sequence is not a stop token"
    assert [output.cached_tokens for output in outputs if output.cached_tokens is not None] == [32]


def test_what_comes_together_is_one_output_for_each_choice() -> None:
    assert len(reader().events(ANSWER)) == 2


def test_an_answer_that_stops_short_is_a_failure() -> None:
    with pytest.raises(EngineFailed, match="without a finish reason"):
        reader().events(b"data: " + json.dumps(choice(0, [5])).encode() + b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize(
    "event",
    [
        b"data: {]\n\n", b'data: {"choices": [{"token_ids": ["a"]}]}\n\n', b"data: \xff\n\n", b'data: {"error": "\xff"}\n\n',
        b'data: {"error": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n\n", b'data: {"choices": [{"token_ids": [-1]}]}\n\n',
        b'data: {"choices": [{"token_ids": [%d]}]}\n\n' % 2**70,
    ],
)  # fmt: skip
def test_nonsense_is_a_failure(event: bytes) -> None:
    with pytest.raises(EngineFailed, match="not understood"):
        reader().events(event)


def test_an_event_without_an_end_is_given_up() -> None:
    read = reader()
    with pytest.raises(EngineFailed, match="more than 8 MB"):
        for _ in range(200):
            read.events(b"data: " + b"x" * 65536)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"detail": "\xff"}'])
def test_a_refusal_may_be_any_nonsense(body: bytes) -> None:
    assert isinstance(refusal(500, body), EngineFailed)


# ------------------------------------------------------------------ connections

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def answering(*pieces: bytes, pause: float = 0.0) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"{}")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        finally:
            writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def to(server: asyncio.Server) -> Connections:
    return Connections(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/prefix", {}, 5.0)


async def whole(connections: Connections) -> bytes:
    connection = await connections.post("/v1/completions", b"{}", {})
    body = b""
    try:
        while data := await connection.read():
            body += data
    finally:
        connections.done(connection)
    return body


async def test_an_answer_in_single_bytes_is_read() -> None:
    raw = OK + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    async with await answering(*(raw[i : i + 1] for i in range(len(raw)))) as server:
        connections = to(server)
        assert await asyncio.wait_for(whole(connections), 20) == b"hello world"
        connections.close()


@pytest.mark.parametrize("raw", [b"", b"HTTP/1.1 200", OK, OK + b"5\r\nhel", b"nonsense\r\n\r\n", OK + b"zz\r\n"])
async def test_an_answer_that_breaks_off_or_is_none_is_lost(raw: bytes) -> None:
    async with await answering(raw) as server:
        connections = to(server)
        with pytest.raises(Lost):
            await asyncio.wait_for(whole(connections), 20)
        connections.close()


async def test_a_reader_who_does_not_read_holds_the_server_back() -> None:
    sent = 0
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"{}")
        writer.write(OK)
        try:
            for _ in range(800):  # 50 MB
                writer.write(chunk)
                await writer.drain()
                sent += 1
            writer.write(b"0\r\n\r\n")
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        connections = to(server)
        connection = await connections.post("/v1/completions", b"{}", {})
        before = -1
        while sent != before:  # until it stands still
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 800
        body = 0
        while data := await asyncio.wait_for(connection.read(), 20):
            assert len(data) < 4 << 20
            body += len(data)
        assert body == 800 * 65536
        connections.done(connection)
        connections.close()


async def asked(body: bytes, end: bytes) -> list[Output]:
    """What becomes of one request whose answer is that body, cut at its end or not."""
    raw = OK + b"%x\r\n" % len(body) + body + b"\r\n" + end

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(raw)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        connections = to(server)
        try:
            async with asyncio.timeout(20):
                return [output async for output in Requests(connections, "http://there", "m").generate(Request(id="r", model="m", token_ids=[1]), CARD, 5)]
        finally:
            connections.close()


async def test_an_answer_that_has_said_that_it_is_done_is_whole_however_its_connection_ends() -> None:
    body = b"data: " + json.dumps(choice(0, [5], "length")).encode() + b"\n\ndata: [DONE]\n\n"
    assert [output.token_ids for output in await asked(body, b"")] == [[5]]


async def test_an_answer_that_ends_in_order_in_its_middle_is_a_broken_stream_and_may_move() -> None:
    with pytest.raises(EngineDead, match="ended in the middle"):
        await asked(b"data: " + json.dumps(choice(0, [5])).encode() + b"\n\n", b"0\r\n\r\n")


# ------------------------------------------------------------------ metrics


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-", "1.0.0"])
def test_a_metric_that_is_no_number_counts_as_nothing(value: str) -> None:
    (load,) = loads_of(f'vllm:num_requests_running{{engine="0"}} {value}\nvllm:num_requests_waiting{{engine="0"}} 3.0\n', 100)
    assert (load.running, load.waiting) == (0, 3)
