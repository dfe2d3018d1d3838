"""The engine `global-router`: to its frontends it is a worker, and it has none of its own; each request goes on to a pool."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import attrs
import msgspec
from attrs import validators as v

from dynamo_core import __version__
from dynamo_core.cards import ModelCard, Role
from dynamo_core.config import Config, Use, build
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.engines import EngineContext
from dynamo_core.errors import AllBusy, ConfigError, DynamoError, EngineDead, NoWorker, Problem, StreamError, Unavailable
from dynamo_core.plugins import Plugins
from dynamo_core.types import Output, Request
from dynamo_global_router import dynamo_json
from dynamo_global_router.card import joined
from dynamo_global_router.contract import Choice, PoolFacts, PoolName, PoolRequest, Strategy
from dynamo_global_router.metrics import RouterMetrics
from dynamo_global_router.pool import Look, Pool, check_stacks
from dynamo_global_router.predicted import Predicted
from dynamo_global_router.record import Decisions, PoolDecision
from dynamo_global_router.ride import Ride
from dynamo_global_router.settings import PoolSettings

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two looks at who is there."""
_serial = itertools.count()


@attrs.define
class GlobalRouter:
    """Serves one model, in one role, by pools of workers."""

    pools: tuple[PoolSettings, ...] = ()
    """The pools, fastest first."""
    strategy: Use | None = attrs.field(default=None, metadata={"kind": "pool_strategy"})
    """How a pool is chosen; `predicted` when unset."""
    role: str = attrs.field(default="aggregated", validator=v.in_(["aggregated", "prefill", "decode"]))
    """What it is to its frontends. `prefill` and `decode` go together: one router of each for a model, each with pools of such workers."""
    model: str | None = None
    """Which model of the pools; may be left out where they serve one."""
    ttft_target_ms: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    """For requests that say nothing: time to the first token."""
    itl_target_ms: float | None = attrs.field(default=None, validator=v.optional(v.gt(0)))
    """For requests that say nothing: time between tokens."""
    decisions: int = attrs.field(default=4096, validator=v.ge(0))
    """How many decision records to keep."""
    startup: float = attrs.field(default=10.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds in which all pools should be there; after that, one is enough to start."""
    dynamo_json: Path | None = None
    """A configuration of NVIDIA Dynamo's global router (JSON), instead of `pools` and `strategy`."""
    _pools: list[Pool] = attrs.field(factory=list[Pool], init=False, repr=False)
    _strategy: Strategy = attrs.field(factory=Predicted, init=False, repr=False)
    _strategy_name: str = attrs.field(default="predicted", init=False, repr=False)
    _following: list[asyncio.Task[None]] = attrs.field(factory=list[asyncio.Task[None]], init=False, repr=False)
    _artifacts: dict[str, bytes] = attrs.field(factory=dict[str, bytes], init=False, repr=False)
    _card: ModelCard | None = attrs.field(default=None, init=False, repr=False)
    _context: EngineContext = attrs.field(factory=EngineContext, init=False, repr=False)
    _metrics: RouterMetrics = attrs.field(factory=lambda: RouterMetrics(()), init=False, repr=False)
    _log: Decisions = attrs.field(factory=lambda: Decisions(0), init=False, repr=False)
    _active: set[str] = attrs.field(factory=set[str], init=False, repr=False)
    _states: dict[str, str] = attrs.field(factory=dict[str, str], init=False, repr=False)
    _prefix: str = attrs.field(factory=lambda: f"p{secrets.token_hex(3)}", init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if bool(self.pools) == (self.dynamo_json is not None):
            raise ValueError("it needs `pools`, or `dynamo_json` instead" if not self.pools else "keep one of `pools` and `dynamo_json`")
        if self.strategy is not None and self.dynamo_json is not None:
            raise ValueError("keep one of `strategy` and `dynamo_json`, which brings its own")
        _unique("are called", [pool.name for pool in self.pools])
        _unique("are the namespace", [pool.namespace or pool.name for pool in self.pools if pool.discovery is None])

    # -------------------------------------------------------------- start

    async def start(self, context: EngineContext) -> ModelCard:
        config, plugins = context.config, context.plugins
        if config is None or plugins is None:
            raise ConfigError(Problem("a global router runs in a worker of a stack", remedy="dynamo worker --engine global-router"))
        role = cast("Role", self.role)
        settings, names, self._strategy, self._strategy_name = await asyncio.to_thread(self._plan, config, plugins)
        self._context = context
        self._log = Decisions(self.decisions)
        self._pools = [Pool(pool, name, config, plugins, role, self.model, self._keep) for pool, name in zip(settings, names, strict=True)]
        self._metrics = RouterMetrics(self._pools)
        self._following = [asyncio.create_task(pool.run(), name=f"follow pool {pool.name.name}") for pool in self._pools]
        self._card = card = await self._first_card(role)
        self._following.append(asyncio.create_task(self._watch(role), name="watch pools"))
        return card

    def check(self, config: Config, plugins: Plugins) -> None:
        """:raises ConfigError: the pools, their stacks and the strategy do not go together."""
        self._plan(config, plugins)

    def _plan(self, config: Config, plugins: Plugins) -> tuple[Sequence[PoolSettings], Sequence[PoolName], Strategy, str]:
        """The pools, and a strategy that is bound to them. :raises ConfigError: they do not go together; says all of it."""
        role = cast("Role", self.role)
        settings, strategy, called, where = self.pools, Predicted(), "predicted", ""
        if self.dynamo_json is not None:
            settings, strategy = dynamo_json.read(self.dynamo_json, role)
            called, where = f"grid of {self.dynamo_json.name}", str(self.dynamo_json)
        elif self.strategy is not None:
            strategy, called, where = build(self.strategy, "pool_strategy", plugins), self.strategy.name, self.strategy.where
        names = [PoolName(pool.name, index if pool.rank is None else pool.rank, pool.cost) for index, pool in enumerate(settings)]
        problems: list[Problem] = []
        if any(pool.discovery is None and (pool.namespace or pool.name) == config.namespace for pool in settings):
            problems.append(Problem(f"a pool has the namespace of the global router itself, {config.namespace!r}", remedy="give one of them another one"))
        for check in (lambda: strategy.bind(names, role), *(partial(check_stacks, pool.router, plugins) for pool in settings)):
            try:
                check()
            except ConfigError as e:
                problems += (attrs.evolve(problem, where=problem.where or where) for problem in e.problems)
        if problems:
            raise ConfigError(*problems)
        return settings, names, strategy, called

    def _keep(self, card: ModelCard, content: bytes) -> None:
        if card.tokenizer is not None:
            self._artifacts[card.tokenizer.digest] = content

    async def _first_card(self, role: Role) -> ModelCard:
        """Wait for the pools: for all of them at first, then for any."""
        patient, warned = time.monotonic() + self.startup, False
        while True:
            cards = [card for pool in self._pools if (card := pool.card()) is not None]
            if time.monotonic() > patient and not warned:
                warned = True
                for pool in self._pools:
                    self._note_state(pool)
            if len(cards) == len(self._pools) or (cards and time.monotonic() > patient):
                for pool in self._pools:
                    pool.first_card = cards[0]
                self._context.progress("ready", 1.0)
                return joined(cards, role, __version__)
            self._context.progress("waiting for pools", len(cards) / len(self._pools))
            await asyncio.sleep(TICK / 5)

    # -------------------------------------------------------------- who is there

    async def _watch(self, role: Role) -> None:
        """Offer what the pools can do together: the model while one is there, and nothing while all are gone."""
        assert self._card is not None
        offered = self._card
        listed = True
        while True:
            cards = [card for pool in self._pools if (card := pool.card()) is not None]
            for pool in self._pools:
                self._note_state(pool)
            if cards:
                # The first card stays the first, so that text is read and written as before, whichever pools are there.
                self._card = joined([self._card, *cards], role, __version__)
            if bool(cards) != listed or self._card != offered:
                listed, offered = bool(cards), self._card
                self._context.offer([self._card] if listed else [])
            await asyncio.sleep(TICK)

    def _note_state(self, pool: Pool) -> None:
        row = pool.look().row
        state = "ready" if row.state == "full" else row.state  # it comes and goes with every burst; the gauge tells
        if self._states.get(row.name, "ready") != state:
            (log.info if state == "ready" else log.warning)("pool %s is %s%s", row.name, state, f": {row.why}" if row.why else "")
        self._states[row.name] = state

    def problems(self) -> Mapping[str, str]:
        """Pools that cannot serve, or not well, and what is wrong inside of the others."""
        found: dict[str, str] = {}
        for pool in self._pools:
            row = pool.look().row
            if row.state != "ready":
                found[f"pool {row.name}"] = f"{row.state}: {row.why}"
            found |= {f"pool {row.name}: {name}": problem for name, problem in pool.problems().items()}
        return found

    def artifact(self, digest: str) -> bytes:
        return self._artifacts[digest]

    def metrics(self) -> bytes:
        return self._metrics.export()

    def controls(self) -> Mapping[str, Callable[[Mapping[str, Any]], Any]]:
        return {"explain": self._explain, "pools": self._show_pools}

    async def _explain(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pools that were weighed for a request, then what the router of each pool that it was sent to decided."""
        decision = self._log.of(str(arguments.get("id", "")))
        if decision is None:
            return {"decisions": []}
        inner = [found for row in decision.rows for id in row.decisions for pool in self._pools if pool.name.name == row.name
                 if (found := pool.decision(id)) is not None]
        return {"decisions": [decision.to_dict(), *inner]}

    async def _show_pools(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        """Each pool as it is now."""
        return {"pools": [_plain(pool) for pool in self._pools]}

    async def probe(self) -> None:
        """:raises EngineDead: it no longer follows its pools. That pools are gone is said by what it offers."""
        if dead := [task.get_name() for task in self._following if task.done()]:
            raise EngineDead(f"these tasks have ended: {', '.join(dead)}")

    # -------------------------------------------------------------- requests

    async def generate(self, request: Request, context: Context) -> AsyncIterator[Output]:
        if self._card is None:
            raise EngineDead("the global router is not running")
        request = _for_pools(request, self._card)
        decision, order = self._decide(request, context)
        if request.id in self._active:
            request = msgspec.structs.replace(request, id=f"{request.id}-{next(_serial):x}")
        self._active.add(request.id)
        ride: Ride | None = None
        try:
            ride, outputs = await self._board(request, context, decision, order)
            while outputs:
                for output in outputs:
                    yield output
                outputs = await ride.read()
        finally:
            self._active.discard(request.id)
            if ride is not None:
                ride.close()
                decision.itl_ms = ride.itl_ms
                self._metrics.finished(decision)

    async def _board(self, request: Request, context: Context, decision: PoolDecision, order: Sequence[tuple[Pool, Look]]) -> tuple[Ride, Sequence[Output]]:
        """The first pool that gives an output. :raises DynamoError: none did, or the error is the request's own."""
        errors: list[DynamoError] = []
        for number, (pool, look) in enumerate(order):
            row, branch, ride = look.row, context.fork(), None
            row.tried = "was asked"
            decision.tried.append(row.name)
            self._metrics.sent(decision, row.name)
            try:
                ride = Ride(pool, look, request, branch, elsewhere=number + 1 < len(order))
                row.decisions = ride.stream.decisions
                outputs = await ride.begin()
            except BaseException as e:
                if ride is not None:
                    ride.close()
                row.tried = f"{e.code}: {e}" if isinstance(e, DynamoError) else "the caller left" if isinstance(e, asyncio.CancelledError) else type(e).__name__
                if not isinstance(e, DynamoError) or not (isinstance(e, Unavailable) or (isinstance(e, StreamError) and e.migratable)):
                    raise
                pool.failed(e)
                self._metrics.failed(row.name, e.code)
                errors.append(e)
                continue
            row.tried, decision.served, decision.ttft_ms = "serves", row.name, ride.ttft_ms
            return ride, outputs
        reasons = [f"pool {look.row.name}: {error}" for (_, look), error in zip(order, errors, strict=True)]
        reasons += [f"pool {row.name} is {row.state}: {row.why}" for row in decision.rows if not row.tried and row.state != "ready"]
        raise (AllBusy if all(isinstance(error, AllBusy) for error in errors) else NoWorker)("the request", reasons)

    def _decide(self, request: Request, context: Context) -> tuple[PoolDecision, Sequence[tuple[Pool, Look]]]:
        """:raises DynamoError: no pool can take it."""
        started = time.perf_counter()
        asked, origins = self._asked(request)
        looks = [(pool, pool.look(request, context.tenant)) for pool in self._pools]
        decision = PoolDecision(f"{self._prefix}-{next(_serial):x}", asked, self._card.name if self._card else "", origins, self._strategy_name, time.time(),
                                [look.row for _, look in looks])
        self._log.push(decision)
        able = [(pool, look) for pool, look in looks if look.row.state == "ready"] or [(pool, look) for pool, look in looks if look.row.state == "degraded"]
        if not able:
            decision.why = "no pool can take it"
            self._metrics.decided(time.perf_counter() - started)
            raise _refusal([look for _, look in looks])
        chosen = self._choose(asked, [look.row.facts for _, look in able if look.row.facts is not None])
        decision.kind, decision.why = chosen.kind, chosen.why
        for row, note in chosen.notes.items():
            able[row][1].row.note = note
        self._metrics.decided(time.perf_counter() - started)
        return decision, [able[row] for row in chosen.order]

    def _asked(self, request: Request) -> tuple[PoolRequest, tuple[str, str]]:
        hints, targets, origins = request.hints, list[float | None](), list[str]()
        for said, default in ((hints.ttft_target_ms, self.ttft_target_ms), (hints.itl_target_ms, self.itl_target_ms)):
            targets.append(default if said is None else said)
            origins.append("request" if said is not None else "default" if default is not None else "nobody")
        asked = PoolRequest(request.id, cast("Role", self.role), len(request.token_ids), hints.priority, targets[0], targets[1], hints.expected_output_tokens)
        return asked, (origins[0], origins[1])

    def _choose(self, asked: PoolRequest, pools: Sequence[PoolFacts]) -> Choice:
        try:
            chosen = self._strategy.choose(asked, pools)
            rows = list(chosen.order)
            if rows and len({*rows}) == len(rows) and all(0 <= row < len(pools) for row in (*rows, *chosen.notes)):
                return chosen
            what = f"it named the rows {rows}, and there are {len(pools)} pools"
        except Exception as e:
            what = f"{type(e).__name__}: {e}"
        log.warning("strategy %s is left out for a request: %s", self._strategy_name, what)
        self._metrics.fault()
        return Choice(sorted(range(len(pools)), key=lambda row: (pools[row].rank, pools[row].name)), "fallback", f"by rank, as the strategy failed: {what}")

    # -------------------------------------------------------------- end

    async def stop(self) -> None:
        self._card = None
        await ended(*self._following)
        self._following.clear()


def _for_pools(request: Request, card: ModelCard) -> Request:
    """As pools should see it: not pinned, as pins name instances of the fleet that this router is in; and with no more tokens than the largest pool has
    room for, as an engine would."""
    hints, stops = request.hints, request.stops
    if hints.instance is not None or hints.prefill_instance is not None or hints.dp_rank is not None:
        request = msgspec.structs.replace(request, hints=msgspec.structs.replace(hints, instance=None, prefill_instance=None, dp_rank=None))
    room = card.context_length - len(request.token_ids)
    if stops.max_tokens is not None and 1 <= room < stops.max_tokens:
        request = msgspec.structs.replace(request, stops=msgspec.structs.replace(stops, max_tokens=room))
    return request


def _refusal(looks: Sequence[Look]) -> DynamoError:
    """Why no pool can take it: what the caller can act on first."""
    reasons = [f"pool {look.row.name} is {look.row.state}: {look.row.why}" for look in looks]
    if any(look.row.state == "full" for look in looks):
        return AllBusy("the request", reasons)
    refusal = next((look.refusal for look in looks if look.refusal is not None), None)
    return refusal or NoWorker("the request", reasons)


def _plain(pool: Pool) -> dict[str, Any]:
    row = pool.look().row
    plain: dict[str, Any] = {"name": row.name, "state": row.state, "why": row.why, "cost": pool.name.cost, "rank": pool.name.rank}
    if row.facts is not None:
        age = row.facts.estimate.age_s
        plain |= {"workers": row.facts.workers, "rates": {
            "prefill_ms": pool.speed.ttft.base, "prefill_ms_per_1000": pool.speed.ttft.slope, "itl_ms": pool.speed.itl.base,
            "itl_ms_per_sequence": pool.speed.itl.slope, "samples": pool.speed.ttft.samples}, "last_request_s": age if math.isfinite(age) else None}
    return plain


def _unique(what: str, values: Sequence[str]) -> None:
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"two pools {what} {', '.join(map(repr, twice))}")
