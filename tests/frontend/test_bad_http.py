"""Garbage, floods and dawdlers: a clear answer or a clean close, and nobody else disturbed."""

from __future__ import annotations

import asyncio
import json

import pytest

from dynamo_core.config.schema import Frontend

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def exchange(port: int, data: bytes, *, eof: bool = False) -> bytes:
    """Send, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if eof:
            writer.write_eof()
        async with asyncio.timeout(30):
            return await reader.read()
    except (ConnectionError, OSError) as e:
        assert not isinstance(e, TimeoutError), "the server neither answered nor closed"
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03" * 64 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nbroken header\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: abc\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 2_000_000 + b"\r\n\r\n",
    ],
    ids=["bytes", "version", "tls", "header", "negative length", "no length", "chunks", "huge header"],
)
async def test_garbage_is_refused_and_others_are_served(each, garbage):
    answer = await exchange(each.port, garbage, eof=True)
    assert answer == b"" or answer.split()[1][:1] in (b"4", b"5") or b"GOAWAY" in answer or answer[:1] == b"\x00", answer[:200]
    assert (await each.chat()).status_code == 200
    assert not each.app.in_progress


async def test_a_body_over_the_limit_is_413_before_it_is_read(run):
    async with run(config=Frontend(max_body_bytes=100_000)) as site:
        response = await site.client.post("/v1/chat/completions", content=b"x" * 3_000_000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert (await site.chat()).status_code == 200
        assert not site.app.in_progress


async def test_an_endless_body_is_cut_and_memory_stays_bounded(run):
    async with run(config=Frontend(max_body_bytes=100_000)) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%b\r\n" % (65536, b"x" * 65536)
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                writer.write(chunk)
                await writer.drain()
                sent += 65536

        flooding = asyncio.create_task(flood())
        async with asyncio.timeout(30):
            try:
                assert b"413" in await reader.readline()
                await reader.read()
            except OSError:
                pass
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        writer.close()
        await site.settled()
        assert (await site.chat()).status_code == 200


async def test_a_client_that_never_finishes_its_body_is_408(run):
    async with run(config=Frontend(body_timeout=0.3)) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(BODY))

        async def dribble() -> None:
            for byte in BODY:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.1)

        dribbling = asyncio.create_task(dribble())
        async with asyncio.timeout(30):
            assert b"408" in await reader.readline()
        dribbling.cancel()
        writer.close()
        await site.settled()
        assert site.finished[-1]["status"] == 408


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind(each):
    _, writer = await asyncio.open_connection("127.0.0.1", each.port)
    writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY[:10])
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await each.settled()
    assert (await each.chat()).status_code == 200


async def test_a_ten_megabyte_prompt_is_answered(each):
    response = await each.chat("x" * 10_000_000)
    assert response.status_code == 200


async def test_pipelined_requests_are_answered_in_order(each):
    one = HEAD + b"content-length: %d\r\nx-request-id: first\r\n\r\n" % len(BODY) + BODY
    two = HEAD + b"content-length: %d\r\nx-request-id: second\r\nconnection: close\r\n\r\n" % len(BODY) + BODY
    answer = await exchange(each.port, one + two)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"x-request-id: first") < answer.index(b"x-request-id: second")


async def test_a_body_that_arrives_byte_by_byte_is_understood(each):
    reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
    for byte in HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY:
        writer.write(bytes([byte]))
        await writer.drain()
    async with asyncio.timeout(30):
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_expect_100_continue_is_honoured(each):
    reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
    writer.write(HEAD + b"expect: 100-continue\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(BODY))
    async with asyncio.timeout(30):
        assert b"100" in await reader.readline()
        writer.write(BODY)
        assert b"HTTP/1.1 200" in await reader.read()
    writer.close()


async def test_a_client_that_sends_nothing_of_its_body_is_408(run):
    async with run(config=Frontend(body_timeout=0.3)) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(HEAD + b"content-length: 100\r\n\r\n")
        async with asyncio.timeout(30):
            assert b"408" in await reader.readline()
        writer.close()
        await site.settled()
        assert site.finished[-1]["status"] == 408


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/live"])
async def test_a_websocket_is_refused_or_answered_as_what_it_asks_for(each, path, caplog):
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
    writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n" + upgrade + b"\r\n")
    async with asyncio.timeout(30):
        status = (await reader.readline()).split()[1]
    writer.close()
    assert status in (b"200", b"403", b"405")
    assert not [record for record in caplog.records if record.exc_info]
    assert (await each.chat()).status_code == 200
