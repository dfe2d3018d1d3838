"""Events kept in a JetStream stream: publishing waits for the stream's acknowledgement, subscribers read the stream from where they were."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, StreamConfig
from nats.js.errors import APIError

from dynamo_core.errors import ConfigError, Problem
from dynamo_nats.connection import Connection

log = logging.getLogger(__name__)

_BATCH = 128
"""Messages that are on their way to the stream at once."""
_TIMEOUT = 2.0
"""Seconds after which a message that was not acknowledged is sent again; the stream knows it if it came the first time."""
_BEAT = 1.0
"""Seconds of silence after which the stream says that there is nothing."""
_SILENCE = 3.0
"""Seconds of silence after which a reader starts anew from where it was."""
_RETRY = 0.3


class DurableStream:
    """`send` is for publishers, `replay` for subscribers."""

    def __init__(self, connection: Connection, prefix: str, limit: int) -> None:
        self.name = f"{prefix.replace('.', '_')}_EVENTS"
        self.connection = connection
        self._prefix = prefix
        self._limit = limit
        self._config: StreamConfig
        self._out: deque[tuple[str, bytes, str]] = deque()
        self._wake = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None
        self._trouble: str | None = None
        self._id = secrets.token_hex(6)
        self._number = 0

    async def open(self, keep: int, seconds: float, replicas: int) -> None:
        """:raises ConfigError: the servers do not keep streams."""
        self._config = StreamConfig(name=self.name, subjects=[f"{self._prefix}.events.>"], max_msgs_per_subject=keep, max_age=seconds,
                                    discard=DiscardPolicy.OLD, num_replicas=replicas)
        try:
            await self.ensure()
        except (NatsError, TimeoutError) as e:
            raise ConfigError(Problem(f"the event stream {self.name} cannot be had: {e or 'no answer'}",
                                      remedy="turn JetStream on in the servers, lower `replicas`, or set `durable = false`")) from e
        self._sender = asyncio.create_task(self._keep_sending(), name="nats events: to the stream")

    async def close(self) -> None:
        if self._sender is not None:
            if self._out and self.connection.up:
                await asyncio.wait([self._sender], timeout=_TIMEOUT)
            self._sender.cancel()
            await asyncio.wait([self._sender])

    def problem(self) -> str | None:
        return self._trouble

    async def ensure(self) -> int:
        """Make the stream unless it is there. Returns the number of its last message."""
        manager = self.connection.client.jetstream(timeout=_TIMEOUT)
        try:
            info = await manager.add_stream(self._config)
        except APIError as e:
            if e.err_code != 10058:  # it exists, with other settings
                raise
            log.warning("the event stream %s exists with other settings than ours; they stay", self.name)
            info = await manager.stream_info(self.name)
        return info.state.last_seq

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
        stream = self.connection.client.jetstream(timeout=_TIMEOUT)
        results = await asyncio.gather(*(stream.publish(subject, data, headers={"Nats-Msg-Id": id}) for subject, data, id in batch), return_exceptions=True)
        failed = [message for message, result in zip(batch, results, strict=True) if isinstance(result, BaseException)]
        if failed:
            error = next(result for result in results if isinstance(result, BaseException))
            self._say(f"the event stream {self.name} does not take events: {error or type(error).__name__}")
            await asyncio.sleep(_RETRY)
            if self.connection.up:
                try:
                    await self.ensure()
                except (NatsError, TimeoutError):
                    pass  # said already; we try again
        else:
            self._say(None)
        return failed

    def _say(self, trouble: str | None) -> None:
        if (trouble is None) != (self._trouble is None):
            log.warning("%s", trouble or f"the event stream {self.name} takes events again")
        self._trouble = trouble

    # ------------------------------------------------------------------ reading

    def replay(self, subject: str, receive: Callable[[Msg], None]) -> Replay:
        replay = Replay(self, subject, f"{self._prefix}.replay.{secrets.token_hex(8)}", receive)
        replay.open()
        return replay


class Replay:
    """Reads one subject of the stream from its first message on, each message once, through every kind of interruption."""

    def __init__(self, stream: DurableStream, subject: str, inbox: str, receive: Callable[[Msg], None]) -> None:
        self._stream = stream
        self._subject = subject
        self._inbox = inbox
        self._receive = receive
        self._generation = 0
        self._deliver = ""
        """Where the consumer in use sends to. Each has its own: what an earlier one still sends is told apart."""
        self._last = 0
        """The number in the stream of the last message that was read."""
        self._expected = 1
        """The number that the consumer gives to its next message."""
        self._heard = 0.0
        self._broken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._number: int | None = None
        self._keeper: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._broken.set()
        self._stream.connection.on_up.append(self._broken.set)
        self._keeper = asyncio.create_task(self._keep_reading(), name=f"nats events: read {self._subject}")

    async def close(self) -> None:
        self._stream.connection.on_up.remove(self._broken.set)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._number is not None:
            await self._stream.connection.unsubscribe(self._number)

    async def _keep_reading(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._broken.wait(), _BEAT)
            except TimeoutError:
                if self._loop.time() - self._heard < _SILENCE:
                    continue
            self._broken.clear()
            if not self._stream.connection.up:
                continue
            try:
                await self._begin()
            except (NatsError, TimeoutError) as e:
                log.debug("cannot read %s from the event stream: %r", self._subject, e)
                await asyncio.sleep(_RETRY)
                self._broken.set()

    async def _begin(self) -> None:
        """A consumer of its own that nobody needs to acknowledge to; the server forgets it once we are gone."""
        if await self._stream.ensure() < self._last:
            self._last = 0  # the stream lost its data; what is published again is told apart by the events' own numbers
        if self._number is not None:
            await self._stream.connection.unsubscribe(self._number)
            self._number = None
        self._generation += 1
        self._deliver = f"{self._inbox}.{self._generation}"
        self._number = await self._stream.connection.subscribe(self._deliver, self._message)
        self._expected = 1
        self._heard = self._loop.time()
        policy = DeliverPolicy.BY_START_SEQUENCE if self._last else DeliverPolicy.ALL
        await self._stream.connection.client.jetstream(timeout=_TIMEOUT).add_consumer(self._stream.name, ConsumerConfig(
            name=f"replay-{secrets.token_hex(6)}", deliver_subject=self._deliver, filter_subject=self._subject,
            ack_policy=AckPolicy.NONE, deliver_policy=policy, opt_start_seq=self._last + 1 if self._last else None, idle_heartbeat=_BEAT,
            inactive_threshold=30.0, mem_storage=True, num_replicas=1, max_deliver=1))

    def _message(self, message: Msg) -> None:
        """What the consumer sends; its reply subject carries the numbers. A heartbeat says which message should have been the last."""
        if message.headers and message.headers.get("Status") == "100":
            self._heard = self._loop.time()
            if int(message.headers.get("Nats-Last-Consumer", "0")) >= self._expected:
                self._broken.set()
            return
        tokens = message.reply.split(".")
        if tokens[:2] != ["$JS", "ACK"]:
            return
        self._heard = self._loop.time()
        stored, delivered = int(tokens[-4]), int(tokens[-3])
        if delivered != self._expected:
            self._broken.set()
            return
        self._expected += 1
        self._last = stored
        self._receive(message)
