"""Keeps the routers of several frontends from herding: each tells the others what it has sent, and counts what they have.

Messages go over the event plane, topic `bookings` below the model's component, one for all that happens in a turn of the event
loop: `[model, role, items]`. An item is `["b", id, instance, rank, prompt_tokens, overlap_tokens, adapter, session, names]` (booked; `names` is `null` or
`[block_size, fingerprint, keys of the prompt's blocks]`), `["f", ...]` (first token), `["g", ..., tokens]` (grew), `["x", ...]` (ended), `["s"]` (forget my
bookings: all that are open follow), `["p", provider, message]` (what a fact provider knows), `["e"]` (no more of that), `["?"]` (one who missed something
asks everybody for `s`) or `["?", true]` (a newcomer asks for `p` and `e` as well).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from dynamo_core.ending import ended
from dynamo_core.events.contract import Event, Gap, Left, Publisher
from dynamo_core.kv.prehashed import Prehashed
from dynamo_core.routing.contract import RoutingRequest, Worker
from dynamo_core.routing.router import Router
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Hints

log = logging.getLogger(__name__)

TOPIC = "bookings"
_PAUSE = 0.2
"""Seconds between two answers to `?`, so that many newcomers get one."""
_ASK_AGAIN = 0.5
"""Seconds after which a newcomer that nobody has answered asks again, and then twice as long each time: where every publisher has to be found first, nobody
hears its first words."""
_ASKED_ENOUGH = 20.0
"""When the next time would be so far away, it is alone."""
_MESSAGE = 200_000
"""Bytes after which a message is full: event planes have their limits."""

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(tuple[str, str, list[list[Any]]])


class Replica:
    """One router among its like. Implements `routing.router.Share`."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self._publisher: Publisher | None = None
        self._outbox: list[list[Any]] = []
        self._theirs: dict[int, dict[str, Worker]] = {}
        """Open bookings of others, by publisher."""
        self._answering: asyncio.TimerHandle | None = None
        self._asking: asyncio.TimerHandle | None = None
        self._teacher: int | None = None
        """Whose providers it is learning from: 0 while nobody has answered, `None` when it has learned. All others know the same."""
        self._newcomers = False
        """Somebody has asked for what providers know."""

    # -------------------------------------------------------------- what this router does

    def booked(self, request: RoutingRequest, worker: Worker, overlap_tokens: int) -> None:
        self._say(self._booking(request, worker, overlap_tokens))

    def first_token(self, request_id: str, worker: Worker) -> None:
        self._say(["f", request_id, *worker])

    def grew(self, request_id: str, worker: Worker, output_tokens: int) -> None:
        self._say(["g", request_id, *worker, output_tokens])

    def finished(self, request_id: str, worker: Worker) -> None:
        self._say(["x", request_id, *worker])

    def _say(self, item: list[Any]) -> None:
        if self._publisher is None:
            return
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(item)

    def _flush(self) -> None:
        items, self._outbox = self._outbox, []
        while items and self._publisher is not None:
            weight = count = 0
            while count < len(items) and weight < _MESSAGE:
                weight += _weight(items[count])
                count += 1
            self._publisher.publish(_encode((self.router.model, self.router.role, items[:count])))
            items = items[count:]

    # -------------------------------------------------------------- what others do

    def connected(self, publisher: Publisher | None) -> None:
        """From now on there is somebody to talk to (or not): ask what is open elsewhere."""
        self._publisher = publisher
        self._outbox.clear()
        if self._asking is not None:
            self._asking.cancel()
        for who in list(self._theirs):
            self.gone(who)
        if publisher is not None:
            self._learn()

    def _learn(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._teacher = 0
        self._ask(_ASK_AGAIN)

    def _ask(self, pause: float) -> None:
        self._asking = None
        if self._teacher == 0:
            self._say(["?", True])
            if pause < _ASKED_ENOUGH:
                self._asking = asyncio.get_running_loop().call_later(pause, self._ask, 2 * pause)

    def missed(self) -> None:
        """Something was lost. Bookings must be right; what providers know beyond them mends itself with use, and may be large."""
        self._say(["?"])

    def gone(self, publisher: int) -> None:
        """That router is no more, and nobody will tell how its requests end."""
        for id, worker in self._theirs.pop(publisher, {}).items():
            self.router.finished(id, worker, "cancelled")

    def left(self, publisher: int) -> None:
        self.gone(publisher)
        if self._teacher == publisher:
            self._learn()

    def heard(self, publisher: int, items: list[list[Any]]) -> None:
        for item in items:
            match item:
                case ["b", str(id), int(instance), int(rank), int(prompt), int(overlap), adapter, session, names]:
                    ids = _prompt(names, prompt)
                    request = RoutingRequest(_named(publisher, id), self.router.model, ids, prompt, hints=Hints(session=session), adapter=adapter)
                    self._book(publisher, request, Worker(instance, rank), overlap)
                case ["f", str(id), int(instance), int(rank)]:
                    self.router.first_token(_named(publisher, id), Worker(instance, rank))
                case ["g", str(id), int(instance), int(rank), int(tokens)]:
                    self.router.grew(_named(publisher, id), Worker(instance, rank), tokens)
                case ["x", str(id), int(instance), int(rank)]:
                    self._theirs.get(publisher, {}).pop(_named(publisher, id), None)
                    self.router.finished(_named(publisher, id), Worker(instance, rank), "done")
                case ["s"]:
                    self.gone(publisher)
                case ["p", str(use), bytes(message)] if self._teacher in (0, publisher):
                    self._teacher = publisher
                    self.router.learn(use, message)
                case ["e"] if self._teacher in (0, publisher):
                    self._teacher = None
                case ["p" | "e", *_]:
                    pass  # for somebody else
                case ["?"] | ["?", True]:
                    self._newcomers = self._newcomers or len(item) == 2
                    if self._answering is None:
                        self._answering = asyncio.get_running_loop().call_later(_PAUSE, self._answer)
                case _:
                    log.debug("a booking of %x is of no known kind", publisher)

    def _book(self, publisher: int, request: RoutingRequest, worker: Worker, overlap: int) -> None:
        if worker in self.router.workers:
            self._theirs.setdefault(publisher, {})[request.id] = worker
            self.router.booked(request, worker, overlap, elsewhere=True)

    def _answer(self) -> None:
        self._answering = None
        self._say(["s"])
        for request, worker, overlap, first, tokens in self.router.open_here():
            self._say(self._booking(request, worker, overlap))
            if first:
                self._say(["f", request.id, *worker])
            if tokens:
                self._say(["g", request.id, *worker, tokens])
        if self._newcomers:
            self._newcomers = False
            for use, message in self.router.state():
                self._say(["p", use, message])
            self._say(["e"])

    def _booking(self, request: RoutingRequest, worker: Worker, overlap: int) -> list[Any]:
        names = self.router.named(request) if self._publisher is not None else ()
        keys = names.keys_of(names.block_size).astype("<u8", copy=False).tobytes() if isinstance(names, Prehashed) else b""
        prompt = request.prompt_tokens or len(request.token_ids)
        return [
            "b", request.id, *worker, prompt, overlap if request.prefills else prompt, request.adapter, request.hints.session,
            [names.block_size, names.fingerprint, keys] if isinstance(names, Prehashed) else None,
        ]


def _prompt(names: Any, tokens: int) -> Sequence[int]:
    """The prompt of a booking elsewhere, as far as it is known."""
    match names:
        case [int(block_size), int(fingerprint), bytes(keys)] if block_size > 0 and len(keys) == 8 * (tokens // block_size):
            return Prehashed(np.frombuffer(keys, "<u8").astype(np.uint64, copy=False), tokens, block_size, fingerprint)
        case _:
            return ()


def _weight(item: list[Any]) -> int:
    """About how many bytes it takes."""
    last = item[-1]
    return 100 + (len(last[-1]) if isinstance(last, list) else len(last) if isinstance(last, bytes) else 0)


def _named(publisher: int, id: str) -> str:
    """Ids are unique in one frontend only."""
    return f"{publisher:x}/{id}"


class Replicas:
    """The replicas of one frontend, joined to the event plane."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: dict[str, list[Replica]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._broken: dict[str, str] = {}
        runtime.on_new_lease(self._again)

    def follow(self, router: Router, component: str) -> None:
        """Let `router` and those of other frontends for the same component know of each other."""
        replicas = self._of.setdefault(component, [])
        if all(replica.router is not router for replica in replicas):
            replica = Replica(router)
            router.share = replica
            replicas.append(replica)
            self._start(component)

    def _start(self, component: str) -> None:
        if (task := self._tasks.get(component)) is not None:
            task.cancel()
        self._tasks[component] = asyncio.create_task(self._keep(component), name=f"replicas {component}")

    async def _keep(self, component: str) -> None:
        delay = 0.2
        while True:
            publisher = None
            try:
                subscription = await self._runtime.subscribe(component, TOPIC)
                try:
                    publisher = await self._runtime.publisher(component, TOPIC)
                    for replica in self._of[component]:
                        replica.connected(publisher)
                    self._broken.pop(component, None)
                    delay = 0.2
                    async for notice in subscription:
                        self._take(component, notice)
                finally:
                    await subscription.close()
            except Exception as e:
                self._broken[component] = f"bookings of other frontends do not arrive: {e}"
                log.warning("replicas of %s: %s", component, self._broken[component])
            finally:
                for replica in self._of[component]:
                    replica.connected(None)
                if publisher is not None:
                    await publisher.close()
            await asyncio.sleep(delay)
            delay = min(2 * delay, 5.0)

    def _take(self, component: str, notice: Event | Gap | Left) -> None:
        if notice.publisher == self._runtime.id:
            return
        match notice:
            case Event(publisher, _, _, payload):
                try:
                    model, role, items = _decoder.decode(payload)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
                    log.debug("a message of %x is no bookings: %s", publisher, e)
                    return
                for replica in self._of[component]:
                    if (replica.router.model, replica.router.role) == (model, role):
                        replica.heard(publisher, items)
            case Gap():
                for replica in self._of[component]:
                    replica.missed()
            case Left(publisher):
                for replica in self._of[component]:
                    replica.left(publisher)

    async def _again(self) -> None:
        """The lease is a new one: the publisher and the subscription of before are dead."""
        for component in self._of:
            self._start(component)

    def problems(self) -> dict[str, str]:
        return {f"replicas {component}": why for component, why in self._broken.items()}

    async def close(self) -> None:
        await ended(*self._tasks.values())
