"""`virtual`: decisions are written to the discovery store, and somebody else acts on them. What runs is what the store lists.

The other side uses `dynamo_planner.connectors.decisions.Decisions`, or reads two JSON records.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import attrs
import msgspec
from attrs import validators as v

from dynamo_core.cards import ModelCard
from dynamo_core.config import build, load_with_plugins
from dynamo_core.discovery.contract import Discovery
from dynamo_core.errors import ConnectorUnavailable, ScaleRefused, StoreUnavailable
from dynamo_core.runtime import names
from dynamo_core.runtime.demand import ColdModel, ColdModels, cold_models
from dynamo_core.scaling import ROLES, RoleState
from dynamo_core.types import Instance
from dynamo_planner.connectors.decisions import Decision, Decisions

log = logging.getLogger("dynamo.planner.virtual")


@attrs.define(eq=False)
class VirtualConnector:
    """Options of `connector = { use = "virtual" }`. When it ends, what runs goes on and the last decision stays."""

    gpus: Mapping[str, int] = attrs.field(validator=[v.deep_mapping(v.in_(ROLES), v.ge(0)), v.min_len(1)])
    """GPUs of one worker, for each role of the deployment."""
    file: Path | None = None
    """The stack whose namespace and discovery store are meant. Default: $DYNAMO_CONFIG."""
    name: str = attrs.field(default="planner", validator=v.matches_re(r"[a-z0-9][a-z0-9_-]*"))
    """Of the decisions: several planners of one namespace have a name each."""
    models: tuple[str, ...] = ()
    """What these workers serve, for frontends that hold requests for it before the first worker has ever run. What has run is known by itself."""
    answer_timeout: float = attrs.field(default=0.0, validator=v.ge(0), metadata={"duration": True})
    """Seconds to wait until whoever acts has taken a decision; 0 waits for nobody."""
    ready_timeout: float = attrs.field(default=600.0, validator=v.gt(0), metadata={"duration": True})
    """Seconds after a decision, after which replicas that are still missing count as never coming."""

    _discovery: Discovery | None = attrs.field(init=False, default=None, repr=False)
    _namespace: str = attrs.field(init=False, default="", repr=False)
    _cold: ColdModels = attrs.field(init=False, default=None, repr=False)
    _decisions: Decisions = attrs.field(init=False, default=None, repr=False)
    _writing: asyncio.Lock = attrs.field(init=False, factory=asyncio.Lock, repr=False)
    _exits: contextlib.AsyncExitStack | None = attrs.field(init=False, default=None, repr=False)
    _missing: dict[str, float] = attrs.field(init=False, factory=dict[str, float], repr=False)
    """Since when a role has had fewer replicas than it should."""

    async def start(self) -> None:
        config, plugins = load_with_plugins(self.file)
        discovery: Discovery = build(config.discovery, "discovery", plugins)
        await self.follow(discovery, config.namespace)

    async def follow(self, discovery: Discovery, namespace: str) -> None:
        """Use this store, instead of the one that the file names. It is entered here, and left by `close`."""
        async with contextlib.AsyncExitStack() as exits:
            try:
                self._discovery = await exits.enter_async_context(discovery)
                self._cold = ColdModels(discovery, namespace)
                exits.push_async_callback(self._cold.close)
                await self._cold.offer([ColdModel(name=name) for name in self.models])
            except StoreUnavailable as e:
                raise ConnectorUnavailable(str(e)) from e
            self._exits = exits.pop_all()
        self._namespace = namespace
        self._decisions = Decisions(discovery, namespace, self.name)

    async def observe(self) -> Mapping[str, RoleState]:
        discovery = self._connected()
        try:
            decision, answer = await self._decisions.last(), await self._decisions.answer()
            cards = await discovery.items(names.models(self._namespace))
            running = _running(await discovery.items(names.instances(self._namespace)), cards)
            await self._cold.offer(cold_models(cards.values()))
        except StoreUnavailable as e:
            raise ConnectorUnavailable(f"who serves is unknown: {e}") from e
        refused = decision is not None and answer is not None and answer.id == decision.id and answer.refused is not None
        targets = decision.targets if decision is not None else {}
        return {role: self._state(role, running[role], targets.get(role, running[role]), refused) for role in self.gpus}

    def _state(self, role: str, running: int, desired: int, refused: bool) -> RoleState:
        ready, missing, surplus = min(running, desired), max(0, desired - running), max(0, running - desired)
        now = time.monotonic()
        if missing:
            late = now - self._missing.setdefault(role, now) > self.ready_timeout
        else:
            self._missing.pop(role, None)
            late = False
        reducible = missing if late or refused else 0
        return RoleState(desired, ready, missing, surplus, self.gpus[role], stable=not (missing or surplus), reducible=reducible)

    async def scale(self, targets: Mapping[str, int], *, reason: str) -> None:
        self._connected()
        for role, count in targets.items():
            if role not in self.gpus:
                raise ScaleRefused(f"this deployment has no {role} workers; it has {', '.join(sorted(self.gpus))}")
            if count < 0:
                raise ScaleRefused(f"there cannot be {count} {role} workers")
        async with self._writing:
            try:
                await self._decide(targets, reason)
            except StoreUnavailable as e:
                raise ConnectorUnavailable(f"the decision may not have been written: {e}") from e

    async def _decide(self, targets: Mapping[str, int], reason: str) -> None:
        before = await self._decisions.last()
        old = before.targets if before is not None else {}
        if all(old.get(role) == count for role, count in targets.items()):
            return
        decision = Decision(id=before.id + 1 if before else 1, targets={**old, **targets}, reason=reason, time=time.time())
        await self._decisions.decide(decision)
        self._missing.clear()  # what is missing now has the whole time again
        if (stayed := await self._decisions.last()) != decision:
            raise ScaleRefused(f"somebody else decided at the same moment, and that stayed: {stayed and (stayed.targets, stayed.reason)}")
        log.info("decision %d: %s (%s)", decision.id, decision.targets, reason)
        if not self.answer_timeout:
            return
        answer = await self._decisions.answered(decision, self.answer_timeout)
        if answer is None:
            raise ConnectorUnavailable(f"nobody took decision {decision.id} within {self.answer_timeout:g} s")
        if answer.refused is not None:
            await self._decisions.decide(Decision(id=decision.id + 1, targets=old, reason=f"decision {decision.id} was refused", time=time.time()))
            raise ScaleRefused(answer.refused)

    async def close(self) -> None:
        exits, self._exits, self._discovery = self._exits, None, None
        if exits is not None:
            await exits.aclose()

    def _connected(self) -> Discovery:
        if self._discovery is None:
            raise ConnectorUnavailable("the connector is not connected")
        return self._discovery


def _running(instances: Mapping[str, bytes], cards: Mapping[str, bytes]) -> collections.Counter[str]:
    """Replicas by role, from what serves and has a card."""
    by_tail = {names.tail(key): value for key, value in cards.items()}
    found: collections.Counter[str] = collections.Counter()
    for key, value in instances.items():
        with contextlib.suppress(msgspec.MsgspecError):
            if msgspec.json.decode(value, type=Instance).endpoint == names.GENERATE and (card := by_tail.get(names.tail(key))) is not None:
                found[msgspec.json.decode(card, type=ModelCard).role] += 1
    return found
