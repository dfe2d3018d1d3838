"""From a generation to the client: the loops that read and send. `await send` is the back-pressure; nothing is queued here."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from starlette.types import Send

from dynamo_core.errors import DynamoError
from dynamo_core.frontend.chunks import Chunks, CompletionChunks
from dynamo_core.frontend.exchange import Exchange
from dynamo_core.frontend.failure import Header
from dynamo_core.frontend.job import Job
from dynamo_core.frontend.metrics import ItlRecorder
from dynamo_core.frontend.servers.contract import DirectSend
from dynamo_core.pipeline.contract import Generation, Pouring
from dynamo_core.types import Delta, LogprobText

log = logging.getLogger("dynamo.frontend")

END_TIMEOUT = 5.0
"""Seconds that a generation has to end after its last finish reason; then it is cancelled."""

_JSON: Header = (b"content-type", b"application/json")
_SSE: Header = (b"content-type", b"text/event-stream; charset=utf-8")
_NO_CACHE: Header = (b"cache-control", b"no-cache")
_NO_BUFFERING: Header = (b"x-accel-buffering", b"no")
"""Proxies of the nginx family hold streams back without it."""


async def stream(job: Job, generation: Generation, first: Sequence[Delta], exchange: Exchange, itl: ItlRecorder, send: Send) -> None:
    """Send events as they become ready. Everything that one read brought leaves in one `send`, the end mark with the last text."""
    options = job.body.stream_options
    chunks = job.chunks(
        job.id,
        int(time.time()),
        job.body.model,
        job.choices,
        echo=job.echoes(),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )
    if isinstance(chunks, CompletionChunks) and job.echo:
        chunks.prompt_logprobs = _prompt_logprobs(job, generation)
    read, write = generation.read, _Writer(job, generation, chunks, exchange, itl).write
    exchange.responding, exchange.status = True, 200
    await send({"type": "http.response.start", "status": 200, "headers": _headers(exchange, generation, _SSE, _NO_CACHE, _NO_BUFFERING)})
    if isinstance(send, DirectSend) and isinstance(generation, Pouring):
        generation.pour(_Direct(send, write))
    deltas = first
    payload = b""
    while deltas:
        payload = write(deltas)
        if chunks.open <= 0:
            break
        if payload:
            await send({"type": "http.response.body", "body": payload, "more_body": True})
            payload = b""
        deltas = await read()
    payload += chunks.end(generation.usage, job.report(exchange, generation, time.monotonic()))
    exchange.finished = True
    await send({"type": "http.response.body", "body": payload, "more_body": False})
    if deltas:
        await _until_end(generation)


class _Writer:
    """Deltas to events, counted."""

    __slots__ = ("_exchange", "_generation", "_itl", "_job", "_keep_ids", "_render")

    def __init__(self, job: Job, generation: Generation, chunks: Chunks, exchange: Exchange, itl: ItlRecorder) -> None:
        self._job = job
        self._generation = generation
        self._render = chunks.write
        self._exchange = exchange
        self._itl = itl
        self._keep_ids = bool(job.kept_ids)

    def write(self, deltas: Sequence[Delta]) -> bytes:
        usage = self._generation.usage
        payload = self._render(deltas, usage)
        if self._keep_ids:
            self._job.keep_ids(deltas)
        _pace(self._exchange, usage.completion_tokens, self._itl)
        return payload


class _Direct:
    """Sends what a generation pours, without a turn of the reading task."""

    __slots__ = ("_send", "_write", "ready")

    def __init__(self, send: DirectSend, write: Callable[[Sequence[Delta]], bytes]) -> None:
        self.ready = send.ready
        self._send = send.write
        self._write = write

    def take(self, deltas: Sequence[Delta]) -> None:
        if payload := self._write(deltas):
            self._send(payload)


async def unary(job: Job, generation: Generation, first: Sequence[Delta], exchange: Exchange, itl: ItlRecorder, send: Send) -> None:
    """Collect the whole answer, then send it: until then an error still has its own status."""
    answer = job.answer(job.choices, job.echoes())
    deltas = first
    while deltas:
        answer.add(deltas)
        if job.kept_ids:
            job.keep_ids(deltas)
        _pace(exchange, generation.usage.completion_tokens, itl)
        if answer.open <= 0:
            break
        deltas = await generation.read()
    logprobs = _prompt_logprobs(job, generation)
    body = answer.encode(job.id, int(time.time()), job.body.model, generation.usage, logprobs, job.report(exchange, generation, time.monotonic()))
    exchange.responding, exchange.status = True, 200
    await send({"type": "http.response.start", "status": 200, "headers": [*_headers(exchange, generation, _JSON), (b"content-length", b"%d" % len(body))]})
    exchange.finished = True
    await send({"type": "http.response.body", "body": body, "more_body": False})
    if deltas:
        await _until_end(generation)


def _pace(exchange: Exchange, tokens: int, itl: ItlRecorder) -> None:
    """Note the time since the read before. The first output has no token before it; that is the time to first token."""
    now = time.monotonic()
    new = tokens - exchange.tokens
    if new > 0:
        if exchange.tokens:
            itl.observe(now - exchange.last_token, new)
        exchange.tokens = tokens
        exchange.last_token = now


async def _until_end(generation: Generation) -> None:
    """The client has everything; let the generation end by itself, so that it does not count as cancelled."""
    try:
        async with asyncio.timeout(END_TIMEOUT):
            while await generation.read():
                pass
    except (TimeoutError, DynamoError) as e:
        log.debug("generation did not end cleanly after its last output", extra={"reason": str(e) or "timeout"})
        generation.cancel("all choices have finished")


def _headers(exchange: Exchange, generation: Generation, *more: Header) -> list[Header]:
    headers = [(b"x-request-id", exchange.request_id.encode("latin-1")), *more]
    if generation.decisions:
        headers.append((b"x-dynamo-decision", ",".join(generation.decisions).encode("latin-1")))
    return headers


def _prompt_logprobs(job: Job, generation: Generation) -> Sequence[LogprobText | None] | None:
    """With the text of the first prompt token, which has no probability of its own (not-a-number stands for that)."""
    entries = generation.prompt_logprobs
    if not entries or entries[0] is not None:
        return entries
    token_id = job.requests[0].token_ids[0]
    text = job.model.preprocessor.decode([token_id], skip_special_tokens=False)
    return [LogprobText(text, token_id, math.nan, list(text.encode())), *entries[1:]]
