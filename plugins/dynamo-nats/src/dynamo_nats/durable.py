"""Events kept in a JetStream stream: publishing waits for the stream's acknowledgement, subscribers read the stream from where they were."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, StreamConfig

from dynamo_core.ending import ended
from dynamo_nats.connection import Connection
from dynamo_nats.stream import RETRY, TIMEOUT, Replay, Stream

log = logging.getLogger(__name__)

_BATCH = 128
"""Messages that are on their way to the stream at once. What is not acknowledged is sent again; the stream knows it if it came the first time."""


class DurableStream:
    """`send` is for publishers, `replay` for subscribers."""

    def __init__(self, connection: Connection, prefix: str, limit: int, keep: int, seconds: float, replicas: int) -> None:
        self._connection = connection
        self._prefix = prefix
        self._limit = limit
        self._stream = Stream(connection, StreamConfig(
            name=f"{prefix.replace('.', '_')}_EVENTS", subjects=[f"{prefix}.events.>"], max_msgs_per_subject=keep, max_age=seconds,
            discard=DiscardPolicy.OLD, num_replicas=replicas))
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._wake = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._id = secrets.token_hex(6)
        self._number = 0

    async def open(self) -> None:
        """:raises ConfigError: the servers do not keep streams."""
        await self._stream.check()
        self._sender = asyncio.create_task(self._keep_sending(), name="nats events: to the stream")

    async def close(self) -> None:
        if self._sender is not None:
            if self._out and self._connection.up:
                await asyncio.wait([self._sender], timeout=TIMEOUT)
            await ended(self._sender)

    def problem(self) -> str | None:
        return self._trouble

    # ------------------------------------------------------------------ publishing

    def send(self, subject: str, data: bytes) -> None:
        if len(self._out) >= self._limit:
            self._out.popleft()
        self._number += 1
        self._out.append((subject, data, f"{self._id}-{self._number}"))
        self._wake.set()

    async def _keep_sending(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._out:
                batch = [self._out.popleft() for _ in range(min(_BATCH, len(self._out)))]
                while batch:
                    batch = await self._store(batch)

    async def _store(self, batch: list[tuple[str, bytes, str]]) -> list[tuple[str, bytes, str]]:
        """Returns what was not acknowledged."""
        stream = self._connection.client.jetstream(timeout=TIMEOUT)
        results = await asyncio.gather(*(stream.publish(subject, data, headers={"Nats-Msg-Id": id}) for subject, data, id in batch), return_exceptions=True)
        failed = [message for message, result in zip(batch, results, strict=True) if isinstance(result, BaseException)]
        if failed:
            error = next(result for result in results if isinstance(result, BaseException))
            self._say(f"the stream {self._stream.name} does not take events: {error or type(error).__name__}")
            await asyncio.sleep(RETRY)
            if self._connection.up:
                try:
                    await self._stream.ensure()
                except (NatsError, TimeoutError):
                    pass  # said already; we try again
        else:
            self._say(None)
        return failed

    def _say(self, trouble: str | None) -> None:
        if (trouble is None) != (self._trouble is None):
            log.warning("%s", trouble or f"the stream {self._stream.name} takes events again")
        self._trouble = trouble

    # ------------------------------------------------------------------ reading

    def replay(self, subject: str, receive: Callable[[Msg], None]) -> Replay:
        replay = Replay(self._stream, subject, f"{self._prefix}.replay.{secrets.token_hex(8)}", lambda message, _: receive(message))
        replay.open()
        return replay
