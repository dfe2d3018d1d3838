"""A JetStream stream: made when it is not there, and read in order whatever happens to the connection."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StreamConfig, StreamInfo
from nats.js.errors import APIError

from dynamo_core.ending import ended
from dynamo_core.errors import ConfigError, Problem, StoreUnavailable
from dynamo_nats.connection import Connection

log = logging.getLogger(__name__)

TIMEOUT = 2.0
"""Seconds after which a call to the servers counts as unanswered."""
RETRY = 0.3
"""Seconds until what failed is tried again."""
_SETTLING = 20.0
"""Seconds that a cluster which is starting, or has just lost a member, gets."""
_EXISTS_OTHERWISE = 10058
_NO_PEERS = 10005
"""Too few servers for the copies: for now, or for ever."""
_UNAVAILABLE = 10008
_BEAT = 1.0
"""Seconds of silence after which the server says that there is nothing."""
_SILENCE = 3.0
"""Seconds of silence after which a reader starts anew."""


class Stream:
    """One stream of the servers."""

    def __init__(self, connection: Connection, config: StreamConfig) -> None:
        assert config.name is not None
        self.name = config.name
        self.connection = connection
        self._config = config
        self._told = False

    async def check(self) -> StreamInfo:
        """Make the stream unless it is there, with patience for a cluster that has yet to elect its leaders.

        :raises ConfigError: the servers do not keep streams, or not so many copies. :raises ConnectionError: they do not answer.
        """
        end = asyncio.get_running_loop().time() + _SETTLING
        while True:
            try:
                return await self.ensure()
            except (NatsError, TimeoutError) as e:
                late = asyncio.get_running_loop().time() > end
                if late and _unanswered(e):
                    raise ConnectionError(f"the stream {self.name} cannot be had from NATS within {_SETTLING:g} s: {e or 'no answer'}") from e
                if late or not (_unanswered(e) or _placing(e)):
                    raise ConfigError(Problem(f"the stream {self.name} cannot be had from NATS: {e}",
                                              remedy="turn JetStream on in the servers, or lower `replicas`")) from e
            await asyncio.sleep(RETRY)

    async def ensure(self) -> StreamInfo:
        """Make the stream unless it is there. :raises NatsError, TimeoutError: it cannot be had now."""
        manager = self.connection.client.jetstream(timeout=TIMEOUT)
        try:
            return await manager.add_stream(self._config)
        except APIError as e:
            if e.err_code != _EXISTS_OTHERWISE:
                raise
        if not self._told:
            self._told = True
            log.warning("the stream %s exists with other settings than ours; they stay", self.name)
        return await manager.stream_info(self.name)


class Replay:
    """Reads messages of the stream from the first one on, in order, through every kind of interruption.

    `received` gets each message and its number. After an interruption it goes on behind the last message; or, when there is somebody to tell (`began`),
    it reads everything anew. Where the end is, no server is asked: the one that sends may hold an older copy, and then its end is an older one. Who must know
    appends a message, and has read everything once he reads that.
    """

    def __init__(self, stream: Stream, subject: str, inbox: str, received: Callable[[Msg, int], None],
                 began: Callable[[StreamInfo], Awaitable[None]] | None = None) -> None:
        self._stream = stream
        self._subject = subject
        self._inbox = inbox
        self._received = received
        self._began = began
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
        self._keeper = asyncio.create_task(self._keep_reading(), name=f"nats: read {self._subject}")

    async def close(self) -> None:
        self._stream.connection.on_up.remove(self._broken.set)
        await ended(self._keeper)
        if self._number is not None:
            await self._stream.connection.unsubscribe(self._number)

    async def _keep_reading(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_BEAT):  # wait_for may swallow a cancellation
                    await self._broken.wait()
            except TimeoutError:
                if self._loop.time() - self._heard < _SILENCE:
                    continue
            self._broken.clear()
            if not self._stream.connection.up:
                continue
            try:
                await self._begin()
            except (NatsError, TimeoutError, StoreUnavailable) as e:
                log.debug("cannot read %s from its stream: %r", self._subject, e)
                await asyncio.sleep(RETRY)
                self._broken.set()

    async def _begin(self) -> None:
        """A consumer of its own that nobody needs to acknowledge to; the server forgets it once we are gone."""
        stream = await self._stream.ensure()
        if self._began is not None or stream.state.last_seq < self._last:
            self._last = 0  # it has lost its data; whoever reads tells by the contents what is new
        if self._number is not None:
            await self._stream.connection.unsubscribe(self._number)
            self._number = None
        self._generation += 1
        self._deliver = f"{self._inbox}.{self._generation}"
        self._number = await self._stream.connection.subscribe(self._deliver, self._message)
        self._expected = 1
        self._heard = self._loop.time()
        if self._began is not None:
            await self._began(stream)
        policy = DeliverPolicy.BY_START_SEQUENCE if self._last else DeliverPolicy.ALL
        await self._stream.connection.client.jetstream(timeout=TIMEOUT).add_consumer(self._stream.name, ConsumerConfig(
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
        self._received(message, stored)


def _unanswered(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or (isinstance(error, APIError) and error.err_code == _UNAVAILABLE)


def _placing(error: Exception) -> bool:
    return isinstance(error, APIError) and error.err_code == _NO_PEERS
