"""Numbers that several processes change: read with their version, written only if nobody was faster. And one clock for all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec
from nats.errors import Error as NatsError
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from dynamo_core.ending import ended
from dynamo_nats.connection import Connection
from dynamo_nats.stream import Stream

log = logging.getLogger(__name__)

_LOOK = 10.0
"""Seconds between two looks at the servers' clock."""
_AGAIN = 0.5
"""Seconds until servers that did not answer are asked again."""
_JUMP = 5.0
"""Seconds by which a clock is not merely inexact."""
_WRONG_SEQUENCE = 10071


class Overtaken(Exception):
    """Somebody else wrote first."""


class Stored(msgspec.Struct, array_like=True, frozen=True):
    at: float
    """When the values were like that, by the servers' clock."""
    values: tuple[float, ...]


class Counts:
    """Records in the memory of the servers, gone `keep` seconds after they were last written."""

    def __init__(self, connection: Connection, prefix: str, keep: float, replicas: int, timeout: float) -> None:
        self.on_jump: list[Callable[[], None]] = []
        """Called when the servers' clock turns out to be another than we thought: what we know of times is worth nothing."""
        self._prefix = f"{prefix}.limits"
        self._timeout = timeout
        self._stream = Stream(connection, StreamConfig(
            name=f"{prefix.replace('.', '_')}_LIMITS", subjects=[f"{self._prefix}.>"], max_msgs_per_subject=1, max_age=keep, storage=StorageType.MEMORY,
            discard=DiscardPolicy.OLD, num_replicas=replicas))
        self._clock = f"clock.{secrets.token_hex(8)}"
        self._ahead: float | None = None
        """Of our monotonic clock."""
        self._trouble: str | None = None
        self._woken = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """:raises ConfigError: the servers do not keep streams."""
        await self._stream.check()
        await self._look_at_clock()
        self._keeper = asyncio.create_task(self._keep_looking(), name="nats limits: clock")

    async def close(self) -> None:
        await ended(self._keeper)

    @property
    def there(self) -> bool:
        """Whether it is worth a try."""
        return self._trouble is None and self._stream.connection.up

    @property
    def now(self) -> float:
        """Unix seconds, by the servers' clock."""
        assert self._ahead is not None, "used before open()"
        return time.monotonic() + self._ahead

    def problem(self) -> str | None:
        return self._stream.connection.problem() or self._trouble

    async def read(self, name: str) -> tuple[Stored | None, int]:
        """What is stored, and its version; 0 when there is nothing. :raises NatsError, TimeoutError: no answer."""
        try:
            message = await self._stream.connection.client.jetstream(timeout=self._timeout).get_last_msg(self._stream.name, f"{self._prefix}.{name}")
        except NotFoundError:
            return None, 0
        stored = msgspec.msgpack.decode(message.data or b"", type=Stored)
        if stored.at > self.now + _JUMP:  # the servers' clock went back
            stored = Stored(self.now, stored.values)
        return stored, message.seq or 0

    async def write(self, name: str, values: Sequence[float], at: float, version: int) -> int:
        """Returns the new version. :raises Overtaken: that is not the version any more. :raises NatsError, TimeoutError: it may be written or not."""
        return await self._publish(name, msgspec.msgpack.encode(Stored(at, tuple(values))), {"Nats-Expected-Last-Subject-Sequence": str(version)})

    def lost(self, error: BaseException) -> None:
        """A call failed: nobody needs to try until we have heard from the servers again."""
        if self._trouble is None:
            self._trouble = f"NATS does not answer: {error or type(error).__name__}"
            log.warning("limits are counted by each process alone: %s", self._trouble)
            self._woken.set()

    async def _publish(self, name: str, data: bytes, headers: dict[str, str] | None = None) -> int:
        stream, subject = self._stream.connection.client.jetstream(timeout=self._timeout), f"{self._prefix}.{name}"
        try:
            try:
                return (await stream.publish(subject, data, headers=headers)).seq
            except NoStreamResponseError:  # servers that were away have lost it
                await self._stream.ensure()
                return (await stream.publish(subject, data, headers=headers)).seq
        except APIError as e:
            if e.err_code == _WRONG_SEQUENCE:
                raise Overtaken from None
            raise

    # ------------------------------------------------------------------ the clock

    async def _keep_looking(self) -> None:
        while True:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await (self._woken.wait() if self._trouble is None else asyncio.sleep(_AGAIN))
            if not self._stream.connection.up:
                continue
            try:
                await self._look_at_clock()
            except (NatsError, TimeoutError) as e:
                self._trouble = self._trouble or f"NATS does not answer: {e or type(e).__name__}"
            else:
                if self._trouble is not None:
                    log.warning("limits are counted together again")
                self._trouble = None

    async def _look_at_clock(self) -> None:
        """Store something and see when the servers say that it was."""
        before = time.monotonic()
        number = await self._publish(self._clock, b"")
        after = time.monotonic()
        message = await self._stream.connection.client.jetstream(timeout=self._timeout).get_msg(self._stream.name, number)
        assert message.time is not None
        known, self._ahead = self._ahead, message.time.timestamp() - (before + after) / 2
        if known is not None and abs(known - self._ahead) > _JUMP:
            for tell in self.on_jump:
                tell()
