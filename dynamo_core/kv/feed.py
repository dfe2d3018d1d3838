"""What one rank of an engine publishes of its KV cache over ZeroMQ, complete and in order.

vLLM and SGLang number their batches, and keep the last ones for replay. A feed asks for a replay when it starts, when a number is missing
or comes again, when the connection was lost, and when news pause. It begins with the batch that it had last: another one in its place
comes from a server that was started again. What even the replay no longer has is answered by forgetting: the whole cache is reported as
cleared, so that nobody counts on blocks that may be gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from dynamo_core.ending import ended
from dynamo_core.engines.contract import BlocksCleared, KvEvent
from dynamo_core.events.zmq_wire import Reader
from dynamo_core.kv.engine_events import EngineEvents

log = logging.getLogger(__name__)

REPLAY_TIMEOUT = 5.0
"""Seconds of silence after which a replay counts as failed."""
_QUIET = 1.0
"""Seconds without news after which the last news are made sure of: no later number tells that the end of a burst was lost."""
_NUMBER = 8
"""Bytes of a batch's number."""
_TURN, _TURN_BYTES = 32, 1 << 17
"""Batches of a replay that are taken in one turn of the event loop: fewer, when they are large."""


class KvFeed:
    """Follows one rank from `open` to `close`. Listens from the moment it is made, so that it can be there before its engine."""

    def __init__(self, rank: int, endpoints: tuple[str, str | None], publish: Callable[[Sequence[KvEvent], int], None], *, media: str | None = None) -> None:
        """:param endpoints: of the engine's publisher and of its replay; without the latter, every loss empties the cache.

        :param media: as in `EngineEvents`.
        """
        self.rank = rank
        self._endpoint, self._replay_endpoint = endpoints
        self._publish = publish
        self._media = media
        self._events = EngineEvents(media)
        # One for the process: a router may follow a hundred engines, and each context has threads of its own.
        self._context = zmq.Context.instance()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.subscribe(b"")
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._endpoint)
        self._connected = False
        self._cut = False
        """The connection was lost, and what has come since is not made sure of yet."""
        self._unanswered = False
        """Of the last replay."""
        self._strange = ""
        """Why what came last was no KV events."""
        self._next = 0
        self._last = b""
        """The batch before `_next`."""
        self._held: list[tuple[int, bytes]] = []
        """What comes while a replay runs."""
        self._heard = 0.0
        self._quiet: asyncio.TimerHandle | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._readers: list[Reader] = []

    async def open(self) -> None:
        """Begin to publish, with what the engine has said since it started."""
        self._loop = asyncio.get_running_loop()
        catching_up = self._make_sure()
        self._readers = [Reader(self._monitor, self._line), Reader(self._socket, self._receive)]
        await asyncio.shield(catching_up)

    async def close(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
        await ended(self._catching_up)
        self._socket.disable_monitor()
        for reader in self._readers:
            reader.close()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)

    def problem(self) -> str:
        """Why nothing may come; empty when all is well."""
        if not self._connected:
            return f"nobody publishes KV events at {self._endpoint}"
        if self._strange:
            return f"{self._endpoint} publishes something else than KV events: {self._strange}"
        return f"{self._replay_endpoint} does not replay KV events" if self._unanswered else ""

    # -------------------------------------------------------------- what comes

    def _line(self, frames: list[bytes]) -> None:
        self._connected = parse_monitor_message(frames)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self._connected:
            self._make_sure()
            self._when_quiet()  # what is published before our subscription arrives is lost, too
        else:
            self._cut = True

    def _receive(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != _NUMBER:
            if not self._strange:
                log.warning("%s publishes something else than KV events; it is left out", self._endpoint)
            self._strange = f"messages are of {len(frames)} frames, or not numbered"
            return
        number, batch = int.from_bytes(frames[1], "big"), frames[2]
        if self._catching_up is None and number == self._next:
            self._take(number, batch)
            self._when_quiet()
        else:
            self._held.append((number, batch))
            self._make_sure()

    def _when_quiet(self) -> None:
        self._heard = self._loop.time()
        if self._quiet is None and self._replay_endpoint is not None:
            self._quiet = self._loop.call_later(_QUIET, self._paused)

    def _paused(self) -> None:
        if (left := self._heard + _QUIET - self._loop.time()) > 0:
            self._quiet = self._loop.call_later(left, self._paused)
        else:
            self._quiet = None
            self._make_sure()

    def _take(self, number: int, batch: bytes) -> None:
        if number > self._next and self._last:
            self._forget(f"batches {self._next} to {number - 1} are lost")
        self._next, self._last = number + 1, batch
        try:
            events = self._events.read(batch)
        except (ValueError, TypeError, OverflowError, RecursionError) as e:
            self._strange = f"batch {number} is not understood: {e}"
            self._forget(self._strange)
            return
        self._strange = ""
        if events:
            self._publish(events, self.rank)

    def _forget(self, why: str) -> None:
        log.warning("KV events of rank %d: %s; its cache counts as empty", self.rank, why)
        self._events = EngineEvents(self._media)
        self._publish([BlocksCleared()], self.rank)

    # -------------------------------------------------------------- what may be missing

    def _make_sure(self) -> asyncio.Task[None]:
        if self._catching_up is None:
            self._catching_up = asyncio.create_task(self._catch_up(), name=f"KV events of rank {self.rank}")
        return self._catching_up

    async def _catch_up(self) -> None:
        """Take everything from `_next` on that the engine still has, then what came meanwhile."""
        sure, cut = False, self._cut
        self._cut = False
        if self._replay_endpoint is not None:
            try:
                await self._replay(self._replay_endpoint, cut)
                sure = True
            except TimeoutError:
                log.warning("the engine did not replay KV events of rank %d within %g s", self.rank, REPLAY_TIMEOUT)
            except ValueError as e:
                log.warning("%s does not replay KV events of rank %d: %s", self._replay_endpoint, self.rank, e)
            self._unanswered = not sure
        held, self._held = self._held, []
        self._catching_up = None
        if cut and not sure and self._next:
            self._start_again(held[0][0] if held else 0)
        for number, batch in held:
            if number < self._next:
                if sure:
                    continue  # the replay had it already
                self._start_again(number)
            self._take(number, batch)

    async def _replay(self, endpoint: str, cut: bool) -> None:
        """:param cut: the connection was lost, so that only the batch that we had last proves that this is the same engine.

        :raises TimeoutError: no answer. :raises ValueError: something else.
        """
        socket = zmq.asyncio.Context.shadow(self._context).socket(zmq.DEALER)
        try:
            socket.connect(endpoint)
            await socket.send_multipart([b"", max(0, self._next - 1).to_bytes(8, "big")])
            known, taken, size = self._next > 0, 0, 0
            async with asyncio.timeout(REPLAY_TIMEOUT) as silence:
                while (answer := await _answer(socket)) is not None:
                    silence.reschedule(self._loop.time() + REPLAY_TIMEOUT)
                    if known and answer != (self._next - 1, self._last) and (cut or answer[0] < self._next):
                        break
                    known = False
                    if answer[0] >= self._next:
                        self._take(*answer)
                    taken, size = taken + 1, size + len(answer[1])
                    if taken >= _TURN or size > _TURN_BYTES:
                        taken = size = 0
                        await asyncio.sleep(0)
        finally:
            socket.close(linger=0)
        if known:
            self._start_again(0)
            await self._replay(endpoint, cut)

    def _start_again(self, number: int) -> None:
        self._forget("the engine was started again, or no longer knows what it said")
        self._next, self._last = number, b""


async def _answer(socket: zmq.asyncio.Socket) -> tuple[int, bytes] | None:
    """One batch of a replay with its number; `None` at its end. :raises ValueError: it is no answer to a replay."""
    frames = await socket.recv_multipart()
    if len(frames) < 2 or len(frames[-2]) != _NUMBER:
        raise ValueError("it answers with something else")
    number = int.from_bytes(frames[-2], "big", signed=True)
    return None if number < 0 else (number, frames[-1])
