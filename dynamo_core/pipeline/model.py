"""One served model: its workers by role, and whether it can take a request."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import msgspec

from dynamo_core.cards import Handover, ModelCard, Role, mismatch
from dynamo_core.config.schema import Disaggregation, Migration
from dynamo_core.context import Context
from dynamo_core.errors import CannotPair, RequestError, Unavailable
from dynamo_core.observability import tracing
from dynamo_core.pipeline.around import Around, Surrounded
from dynamo_core.pipeline.bootstrap import BootstrapStream
from dynamo_core.pipeline.contract import Generation
from dynamo_core.pipeline.disagg import DisaggregatedStream
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.pipeline.encode import EncodeStage
from dynamo_core.pipeline.generation import TextGeneration
from dynamo_core.pipeline.handover import suits
from dynamo_core.pipeline.metrics import PipelineMetrics
from dynamo_core.pipeline.migrate import TokenStream
from dynamo_core.pipeline.places import Places
from dynamo_core.preprocess.contract import FollowsCard, Preprocessor
from dynamo_core.preprocess.limits import check_media, check_token_ids, fit
from dynamo_core.routing.contract import Worker
from dynamo_core.types import Instance, Request, TextOptions

_serial = itertools.count()


@attrs.define
class Member:
    """One instance of the model, as this frontend knows it."""

    instance: Instance
    card: ModelCard
    proven: bool = False
    problem: str | None = None

    @property
    def workers(self) -> Sequence[Worker]:
        first = self.card.dp_start
        return [Worker(self.instance.id, rank) for rank in range(first, first + self.card.dp_size)]


class ServedModel:
    """Implements `pipeline.contract.Model`."""

    def __init__(self, card: ModelCard, preprocessor: Preprocessor, dispatcher: Callable[[Role], Dispatcher], migration: Migration, metrics: PipelineMetrics,
                 around: Sequence[Around] = (), disaggregation: Disaggregation | None = None) -> None:
        self.name = card.name
        self.card = card
        self.checksum = card.checksum()
        self.preprocessor = preprocessor
        self.created = int(time.time())
        self.members: dict[int, Member] = {}
        self.dispatchers: dict[Role, Dispatcher] = {}
        self._places = Places()
        self._make_dispatcher = dispatcher
        self._migration = migration
        self._around = around
        self._disaggregation = disaggregation or Disaggregation()
        self._metrics = metrics
        self._serving: frozenset[Role] = frozenset()
        self._needs: tuple[tuple[Role, ...], ...] = ()
        """Sets of roles, one of which must be present as well; empty when some worker needs nobody."""
        """Roles that have a proven worker. Kept, because every request asks."""
        self._handover = Handover()
        """Of the decode workers, which agree on it."""
        self._last_left: float | None = None
        self._active: set[str] = set()

    # -------------------------------------------------------------- members

    def dispatcher(self, role: Role) -> Dispatcher:
        if (found := self.dispatchers.get(role)) is None:
            found = self.dispatchers[role] = self._make_dispatcher(role)
            found.places = self._places
        return found

    def check_pair(self, card: ModelCard) -> None:
        """:raises CannotPair: it could not hand KV blocks to a worker that is here already, or take them from it."""
        peer: Role = "prefill" if card.role == "decode" else "decode"
        if card.role not in ("prefill", "decode"):
            return
        for member in self.members.values():
            if member.card.role == peer and (why := mismatch(card, member.card)) is not None:
                raise CannotPair(f"this {card.role} worker cannot hand over with {peer} worker {member.instance.label}: {why}; make them alike")

    def add(self, member: Member) -> None:
        """Known to the router from now on, and avoided until it is proven."""
        self.members[member.instance.id] = member
        dispatcher = self.dispatcher(member.card.role)
        dispatcher.instances[member.instance.id] = member.instance
        for worker in member.workers:
            dispatcher.router.joined(worker, member.instance, member.card)
        self._count()

    def proven(self, member: Member) -> None:
        member.proven, member.problem = True, None
        dispatcher = self.dispatcher(member.card.role)
        for worker in member.workers:
            dispatcher.router.proven(worker)
        dispatcher.changed()
        self._count()

    def remove(self, instance_id: int) -> Member | None:
        member = self.members.pop(instance_id, None)
        if member is not None:
            dispatcher = self.dispatcher(member.card.role)
            for worker in member.workers:
                dispatcher.router.left(worker)
            dispatcher.instances.pop(instance_id, None)
            self._last_left = time.monotonic()
            self._count()
        return member

    def _count(self) -> None:
        proven = [m for m in self.members.values() if m.proven]
        self._serving = frozenset(m.card.role for m in proven)
        able = [m.card for m in proven if m.card.role in ("aggregated", "decode")]
        needs = [() if card.role == "decode" and card.handover.decode_alone and self._disaggregation.fallback else card.needs for card in able]
        self._needs = tuple(itertools.chain.from_iterable(needs)) if all(needs) else ()
        self._handover = next((m.card.handover for m in proven if m.card.role == "decode"), Handover())
        # Each may get any request, so that the shortest context is what the model has.
        length = min((m.card.context_length for m in proven or self.members.values()), default=self.card.context_length)
        if length != self.card.context_length:
            self.card = msgspec.structs.replace(self.card, context_length=length)
            if isinstance(self.preprocessor, FollowsCard):
                self.preprocessor.card = self.card
        self._metrics.workers(sum(m.proven for m in self.members.values()), len(self.members))

    def not_ready(self) -> str | None:
        if not self._serving.isdisjoint(("aggregated", "decode")) and (not self._needs or any(self._serving.issuperset(need) for need in self._needs)):
            return None
        if not self.members:
            ago = "" if self._last_left is None else f"; the last one left {time.monotonic() - self._last_left:.0f} s ago"
            return f"no worker of model {self.name!r} is registered{ago}"
        waiting = [m for m in self.members.values() if not m.proven]
        if waiting:
            why = next((m.problem for m in waiting if m.problem), None)
            return f"{len(waiting)} of {len(self.members)} workers of model {self.name!r} have not answered their canary yet" + (f": {why}" if why else "")
        roles = ", ".join(sorted(self._serving))
        if self._needs:
            wanted = " or ".join(sorted({" and ".join(need) for need in self._needs}))
            return f"model {self.name!r} has only {roles} workers, and they need {wanted} workers beside them"
        return f"model {self.name!r} has only {roles} workers; an aggregated or a decode worker is missing"

    def lost(self) -> str | None:
        able = [dispatcher.router for role, dispatcher in self.dispatchers.items() if role in ("aggregated", "decode") and dispatcher.instances]
        if not able or not all(router.all_lost() for router in able):
            return None
        return f"every worker of model {self.name!r} failed a moment ago and is avoided (migration.inhibit)"

    # -------------------------------------------------------------- requests

    async def start(self, request: Request, text: TextOptions, context: Context) -> Generation:
        if self._around:
            return Surrounded(self._around, request, context, lambda request: self._generate(request, text, context))
        return await self._generate(request, text, context)

    async def _generate(self, request: Request, text: TextOptions, context: Context) -> TextGeneration:
        self._check(request)
        request = self._places.applied(request)
        if request.id in self._active:
            # Two requests of one id would share a booking; the caller's own id stays in the context.
            request = msgspec.structs.replace(request, id=f"{request.id}-{next(_serial):x}")
        self._active.add(request.id)
        span = tracing.start("generate", context.traceparent, {"request.id": context.id, "model": self.name, "prompt.tokens": len(request.token_ids)})
        context.traceparent = span.traceparent

        workers: list[str] = []

        def ended(error: BaseException | None) -> None:
            self._active.discard(request.id)
            span.set("workers", ",".join(workers))
            span.end(error)

        try:
            decisions: list[str] = []
            if request.media and "encode" in self._serving:
                stage = EncodeStage(self.dispatcher("encode"), attempts=self._migration.limit + 1, fallback=self._disaggregation.fallback,
                                    block_size=self.card.block_size)  # fmt: skip
                decisions, workers = stage.decisions, stage.workers
                request = await stage.run(request, context)
            stream = self._stream(request, context)
            stream.decisions[:0], stream.workers[:0] = decisions, workers
            workers = stream.workers
            await stream.start()
        except BaseException as e:
            ended(e)
            raise
        span.event("routed", {"decision": stream.decisions[-1], "worker": stream.workers[-1]})
        return TextGeneration(stream, request, text, self.preprocessor, ended)

    def tokens(self, request: Request, context: Context, role: Role | None = None) -> TokenStream:
        """A generation without text, for callers that pass tokens on; it is not started. The caller keeps request ids apart.

        :param role: by workers of this role alone, whatever may be missing beside them.
        :raises RequestError: the request does not fit. :raises Unavailable: the model is not ready.
        """
        check_media(self.card, request)
        request = self._places.applied(request)
        if role is not None:
            return TokenStream(request, self.card, context, self.dispatcher(role), self._migration, self._metrics)
        self._check(request)
        return self._stream(request, context)

    def roles(self) -> tuple[Role, Role]:
        """Which workers read prompts, and which generate."""
        main = self._main_role()
        return ("prefill" if main == "decode" and "prefill" in self._serving else main), main

    def _stream(self, request: Request, context: Context) -> TokenStream:
        role = self._main_role()
        decode = self.dispatcher(role)
        alone = role != "decode" or self._handover.decode_alone
        if not alone and not suits(request):
            raise RequestError(f"the decode workers of model {self.name!r} read no prompts: one choice, and no logprobs of the prompt", param="n")
        possible = role == "decode" and suits(request) and ("prefill" in self._serving or not self._disaggregation.fallback or not alone)
        if not possible or (alone and not self._worth_it(request, decode, context)):
            return TokenStream(request, self.card, context, decode, self._migration, self._metrics)
        parts = (request, self.card, context, self.dispatcher("prefill"), decode)
        fallback = self._disaggregation.fallback and alone
        if self._handover.protocol == "bootstrap":
            return BootstrapStream(*parts, self._migration, self._metrics, handover=self._handover_of, fallback=fallback)
        return DisaggregatedStream(*parts, self._disaggregation, self._migration, self._metrics)

    def _handover_of(self, worker: Worker) -> Handover:
        member = self.members.get(worker.instance)
        return Handover() if member is None else member.card.handover

    def _main_role(self) -> Role:
        """Who generates: decode workers where prefill workers stand beside them, else whoever can do it alone."""
        if "decode" in self._serving and ("prefill" in self._serving or "aggregated" not in self._serving):
            return "decode"
        return "aggregated"

    def _worth_it(self, request: Request, decode: Dispatcher, context: Context) -> bool:
        """Whether enough of the prompt must be computed. A pinned or short prompt asks nobody."""
        least = self._disaggregation.min_prompt
        if len(request.token_ids) < least:
            return False
        return not least or len(request.token_ids) - decode.router.dry_run(decode.asked(request, tenant=context.tenant)).overlap_tokens >= least

    async def route(self, request: Request, context: Context) -> str:
        self._check(request)
        dispatcher = self.dispatcher(self._main_role())
        return dispatcher.router.dry_run(dispatcher.asked(self._places.applied(request), tenant=context.tenant)).id

    def _check(self, request: Request) -> None:
        """What must hold whoever built the request. :raises RequestError: the client's fault. :raises Unavailable: not ready."""
        check_token_ids(self.card, request.token_ids)
        check_media(self.card, request)
        fit(self.card, len(request.token_ids), request.stops.max_tokens)
        if (missing := self.not_ready()) is not None:
            raise Unavailable(missing)

    def status(self) -> dict[str, Any]:
        """For `/health` and `/debug/fleet`."""
        return {
            "ready": self.not_ready() is None,
            "missing": self.not_ready(),
            "context_length": self.card.context_length,
            "workers": [
                {"id": f"{m.instance.id:016x}", "label": m.instance.label, "role": m.card.role, "address": m.instance.address, "pid": m.instance.pid,
                 "host": m.instance.host, "engine": m.card.engine, "proven": m.proven, "problem": m.problem}
                for m in self.members.values()
            ],
        }
