"""The worker role: an engine, its card in discovery, a canary that proves it alive, and an orderly end.

The order of an end (drain): leave discovery, keep serving, wait for requests in progress and for KV hand-offs, then break
what is left with a migratable error, then stop the engine. Each step is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from dynamo_core.cards import ModelCard
from dynamo_core.config.schema import Worker as Settings
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines.contract import Controls, Drains, Engine, EngineContext, HasArtifacts, KvEvent, Probes
from dynamo_core.errors import DynamoError, EngineDead, EngineFailed, RequestError, WorkerDraining
from dynamo_core.events.contract import Publisher
from dynamo_core.observability import tracing
from dynamo_core.runtime import names
from dynamo_core.runtime.admission import Admission
from dynamo_core.runtime.metrics import WorkerMetrics
from dynamo_core.runtime.relay import KvRelay
from dynamo_core.runtime.runtime import EndpointHandler, Runtime
from dynamo_core.runtime.shared_secret import shared_secret
from dynamo_core.types import Load, Output, Request, Sampling, Stops

log = logging.getLogger(__name__)

SETTLE = 1.0
"""Seconds, by default, after leaving discovery for which new requests are still taken: callers see the change a moment later."""

_decode_request = msgspec.msgpack.Decoder(Request).decode
_encode = msgspec.msgpack.encode


class Worker:
    """Serves one engine under `namespace.<name>.generate`."""

    def __init__(self, runtime: Runtime, engine: Engine, settings: Settings, metrics: WorkerMetrics, *, settle: float = SETTLE,
                 label: str = "") -> None:
        """:param label: in log lines, where a process has several workers of one name."""
        self.label = label or settings.name
        self.runtime = runtime
        self.engine = engine
        self.settings = settings
        self._settle = settle
        self.metrics = metrics
        self.admission = Admission(settings.max_requests)
        self.card: ModelCard | None = None
        self.dead = asyncio.Event()
        """The engine died; `problems` says of what. The worker must end."""
        self.phase: tuple[str, float | None] = ("starting", None)
        self._problem: str | None = None
        self._loop = asyncio.get_running_loop()
        self._publishers: dict[str, Publisher] = {}
        self._relay: KvRelay | None = None
        self._early: list[tuple[Sequence[KvEvent], int]] = []
        """What the engine reported of its KV cache before its card was there."""
        self._probe: asyncio.Task[None] | None = None
        self._canary: asyncio.Task[None] | None = None
        self._returned = asyncio.Event()
        """An engine that did not answer its canary offers something again: there is no need to wait for the next."""
        self._visible = False
        self._offered: tuple[ModelCard, ...] | None = None
        """What the engine says that it serves; `None`: the card that it started with."""
        self._shown: dict[str, ModelCard] = {}
        """What is in discovery, by endpoint."""
        self._showing = asyncio.Lock()
        self._updates: set[asyncio.Task[None]] = set()

    # -------------------------------------------------------------- start

    async def start(self) -> ModelCard:
        """Start the engine, prove it by a canary, and announce it."""
        started = time.monotonic()
        context = EngineContext(progress=self._progress, kv_events=self._kv_events, load=self._load, died=self._died, offer=self._offer,
                                name=self.label, role=self.settings.role, config=self.runtime.config, plugins=self.runtime.plugins)
        await self._open_publishers()
        self.runtime.on_new_lease(self._open_publishers)
        heartbeat = asyncio.create_task(self._heartbeat(), name="start-up heartbeat")
        try:
            card = await self.engine.start(context)
        finally:
            heartbeat.cancel()
        self.card = card = self._as_configured(card)
        endpoints: dict[str, EndpointHandler] = {
            names.GENERATE: self.generate, names.ARTIFACT: self._artifact, names.PROBE: self._answer_probe, names.CONTROL: self._control,
        }
        if card.kv_events:
            self._relay = KvRelay(card, await shared_secret(self.runtime, "kv"), lambda payload: self._publish("kv", payload))
            endpoints[names.KV_STATE] = self._relay.answer
            for events, dp_rank in self._early:
                self._relay.reported(events, dp_rank)
        self._early.clear()
        await self.runtime.serve(self.settings.name, endpoints)
        self._progress("canary", None)
        await self.probe()
        await self._announce()
        self._canary = asyncio.create_task(self._watch_engine(), name="canary")
        self.metrics.started(card, time.monotonic() - started)
        self._progress("ready", 1.0)
        return card

    def _as_configured(self, card: ModelCard) -> ModelCard:
        if self.settings.served_name and card.adapter is None:
            card = msgspec.structs.replace(card, name=self.settings.served_name)
        if self.settings.role:
            card = msgspec.structs.replace(card, role=self.settings.role)
        return card

    async def _announce(self) -> None:
        self._visible = True
        await self._show()

    async def withdraw(self) -> None:
        """Leave discovery with every model; what is being served goes on."""
        self._visible = False
        await self._show()

    async def _show(self) -> None:
        """Bring discovery in line with what is offered."""
        async with self._showing:
            wanted = {names.generate(card.adapter): card for card in self.models() or ()}
            for endpoint in self._shown.keys() - wanted.keys():
                await self.runtime.withdraw(self.settings.name, endpoint)
                del self._shown[endpoint]
            for endpoint, card in wanted.items():
                if self._shown.get(endpoint) != card:
                    await self.runtime.announce(self.settings.name, endpoint, msgspec.json.encode(card))
                    self._shown[endpoint] = card

    def models(self) -> Sequence[ModelCard] | None:
        """What may be asked of this worker: nothing where another node has the head. `None` before it is ready, and when it has left."""
        if not self._visible or self.card is None:
            return None
        return [self.card] if self._offered is None else [self._as_configured(card) for card in self._offered]

    def _progress(self, phase: str, fraction: float | None) -> None:
        if phase != self.phase[0]:
            log.info("worker %s: %s", self.label, phase)
        self.phase = (phase, fraction)

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(5)
            phase, fraction = self.phase
            log.info("worker %s: still in phase %s%s", self.label, phase, "" if fraction is None else f", {fraction:.0%}")

    async def _open_publishers(self) -> None:
        for topic in ("load", "kv"):
            self._publishers[topic] = await self.runtime.publisher(self.settings.name, topic)

    # -------------------------------------------------------------- requests

    async def generate(self, payload: bytes, context: Context) -> AsyncIterator[Output]:
        """One request. The stream is the engine's own, counted in and out."""
        admission, metrics = self.admission, self.metrics
        try:
            request = _decode_request(payload)
        except msgspec.MsgspecError as e:
            raise EngineFailed(f"the request does not decode: {e}") from e
        if self.dead.is_set():
            raise EngineDead(self._problem or "the engine died")
        try:
            admission.enter(context)
        except DynamoError as e:
            metrics.refused(e.code)
            raise
        span = tracing.start("engine.generate", context.traceparent, {"request.id": request.id, "prompt.tokens": len(request.token_ids)})
        started = time.perf_counter()
        tokens = 0
        outcome = "cancelled"
        outputs = self.engine.generate(request, context)
        try:
            async for output in outputs:
                admission.moved = True
                tokens += len(output.token_ids)
                yield output
            outcome = "done"
            if self._relay is not None:
                self._relay.prompted(len(request.token_ids))
        except GeneratorExit:
            raise
        except asyncio.CancelledError:
            if admission.broken is None or context.cancelled:
                raise
            outcome = admission.broken.code
            raise admission.broken from None
        except BaseException as e:
            outcome = e.code if isinstance(e, DynamoError) else "internal"
            if not isinstance(e, DynamoError):
                log.exception("request %s broke the engine", request.id)
            if self.dead.is_set() and not isinstance(e, RequestError):
                raise EngineDead(self._problem or "the engine died") from e
            raise
        finally:
            # Closing a generator does not close the one that it iterates over, not until it is collected.
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
            admission.leave(context)
            span.set("output.tokens", tokens)
            span.end()
            metrics.request(outcome, len(request.token_ids), tokens, time.perf_counter() - started)

    async def _artifact(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        digest = payload.decode("ascii", "replace")
        if not isinstance(self.engine, HasArtifacts):
            raise RequestError(f"this worker has no artifact {digest}")
        try:
            content = self.engine.artifact(digest)
        except KeyError:
            raise RequestError(f"this worker has no artifact {digest}") from None
        for start in range(0, len(content), 1 << 18):
            yield content[start : start + (1 << 18)]

    async def _control(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """Payload and answer are JSON: `{"action": name, ...arguments}`; without an action, the list of actions."""
        arguments: Any = msgspec.json.decode(payload or b"{}")
        yield msgspec.json.encode(await self.control(arguments.pop("action", None), arguments))

    async def control(self, action: str | None, arguments: Mapping[str, Any]) -> Any:
        """:raises RequestError: there is no such action."""
        actions = self.engine.controls() if isinstance(self.engine, Controls) else {}
        if action is None:
            return {"actions": sorted(actions)}
        if action not in actions:
            raise RequestError(f"this engine has no action {action!r}; it has: {', '.join(sorted(actions)) or 'none'}")
        return await actions[action](arguments)

    # -------------------------------------------------------------- health

    async def _answer_probe(self, payload: bytes, context: Context) -> AsyncIterator[bytes]:
        """With the name of an endpoint: whether it should be listed. :raises WorkerDraining: it has left discovery on purpose."""
        if payload and not self.runtime.announces(self.settings.name, payload.decode()):
            raise WorkerDraining("it has left discovery")
        await self.probe()
        yield b"ok"

    async def probe(self) -> None:
        """Prove the engine by real work; callers that come together share one probe. :raises EngineDead: it does not answer."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe(), name="probe")
        await asyncio.shield(self._probe)

    async def _run_probe(self) -> None:
        try:
            async with asyncio.timeout(self.settings.canary_timeout):
                if isinstance(self.engine, Probes):
                    await self.engine.probe()
                    return
                request = Request(id="canary", model="", token_ids=[0], cache_salt="dynamo-canary", sampling=Sampling(temperature=0.0),
                                  stops=Stops(max_tokens=1, ignore_eos=True))
                async with contextlib.aclosing(self.engine.generate(request, Context("canary"))) as outputs:  # pyright: ignore[reportArgumentType]
                    async for output in outputs:
                        if output.token_ids or output.finish_reason:
                            return
                raise EngineDead("the canary came back empty")
        except TimeoutError:
            raise EngineDead(f"no answer to the canary within {self.settings.canary_timeout:g} s") from None

    async def _watch_engine(self) -> None:
        """Silence is probed; an engine that does not answer leaves discovery until it does."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.canary_interval):
                    await self._returned.wait()
            self._returned.clear()
            if self.admission.moved and self._problem is None:
                self.admission.moved = False
                continue
            try:
                await self.probe()
            except Exception as e:  # an engine may break in any way, and the next probe is due all the same
                if self.dead.is_set():
                    return
                if self._problem is None:
                    log.error("worker %s does not answer its canary and leaves discovery: %s", self.label, e)
                self._problem = f"canary: {e or type(e).__name__}"
                await self.withdraw()
                if not self.admission.moved:
                    # Nothing came while the canary was out, either: whoever waits here is better off elsewhere.
                    self.admission.break_all(EngineDead("the engine hangs: it answers neither requests nor its canary"))
                self.admission.moved = False
            else:
                if self._problem is not None:
                    log.warning("worker %s answers again", self.label)
                    self._problem = None
                    await self._announce()

    def problems(self) -> dict[str, str]:
        """Named degraded states; empty when all is well."""
        found = dict(self.runtime.problems())
        if self._problem:
            found["engine"] = self._problem
        elif self.card is None:
            phase, fraction = self.phase
            found["starting"] = phase if fraction is None else f"{phase} {fraction:.0%}"
        return found | (self._relay.problems() if self._relay else {})

    # -------------------------------------------------------------- what the engine reports, from any thread

    def _kv_events(self, events: Sequence[KvEvent], dp_rank: int) -> None:
        self._in_loop(lambda: self._changed(events, dp_rank))

    def _changed(self, events: Sequence[KvEvent], dp_rank: int) -> None:
        if self._relay is not None:
            self._relay.reported(events, dp_rank)
        elif self.card is None:
            self._early.append((events, dp_rank))

    def _load(self, load: Load) -> None:
        self._in_loop(lambda: self._report(load))

    def _report(self, load: Load) -> None:
        self.metrics.load(load)
        self._publish("load", _encode(load))

    def _offer(self, cards: Sequence[ModelCard]) -> None:
        self._in_loop(lambda: self._set_offered(tuple(cards)))

    def _set_offered(self, cards: tuple[ModelCard, ...]) -> None:
        self._offered = cards
        if cards and self._problem is not None:
            self._returned.set()
        if self._visible:
            task = asyncio.create_task(self._show(), name="show what is offered")
            self._updates.add(task)
            task.add_done_callback(self._updates.discard)

    def _died(self, reason: str) -> None:
        self._in_loop(lambda: self._set_dead(reason))

    def _set_dead(self, reason: str) -> None:
        if not self.dead.is_set():
            log.error("the engine of worker %s died: %s", self.label, reason)
            self._problem = reason
            self.dead.set()

    def _publish(self, topic: str, payload: bytes) -> None:
        if (publisher := self._publishers.get(topic)) is not None:
            publisher.publish(payload)

    def _in_loop(self, call: Callable[[], None]) -> None:
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            call()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)

    # -------------------------------------------------------------- end

    async def drain(self) -> None:
        """Leave in order. Idempotent; `stop` comes after it."""
        if self._canary is not None:
            self._canary.cancel()
        if self._visible:
            await self.withdraw()
            log.info("worker %s left discovery; %d requests in progress", self.label, self.admission.in_flight)
            await asyncio.sleep(min(self._settle, self.settings.drain_timeout))
        self.admission.close("this worker is leaving")
        if not await self.admission.idle(self.settings.drain_timeout):
            log.warning("worker %s: %d requests are still in progress after %g s; they move to other workers",
                        self.label, self.admission.in_flight, self.settings.drain_timeout)
            self.admission.break_all(WorkerDraining("this worker is leaving"))
            await self.admission.idle(2.0)
        if isinstance(self.engine, Drains):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.drain_timeout):
                    await self.engine.drain()

    async def stop(self) -> None:
        if self._canary is not None:
            self._canary.cancel()
        if self._probe is not None:
            await ended(self._probe)
        await asyncio.gather(*self._updates, return_exceptions=True)
        if self._relay is not None:
            self._relay.close()
        await self.engine.stop()


