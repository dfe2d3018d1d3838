"""Every model that this frontend knows, kept in step with discovery.

A worker passes three gates before it serves: its card agrees with the model's, its tokenizer is loaded *here*, and one
canary sent from *here* has come back. Until then the router knows it and says why it is avoided.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from dynamo_core.cards import ModelCard, Role
from dynamo_core.config import build
from dynamo_core.context import Context
from dynamo_core.ending import ended
from dynamo_core.errors import DynamoError, ModelNotFound, Unavailable
from dynamo_core.pipeline import artifacts
from dynamo_core.pipeline.around import Around
from dynamo_core.pipeline.dispatch import Dispatcher
from dynamo_core.pipeline.feeds import EventFeeds
from dynamo_core.pipeline.metrics import PipelineFamilies, PipelineMetrics
from dynamo_core.pipeline.model import Member, ServedModel
from dynamo_core.pipeline.observers import tell
from dynamo_core.pipeline.partings import Partings
from dynamo_core.pipeline.replicas import Replicas
from dynamo_core.pipeline.stacks import Stacks
from dynamo_core.pipeline.surroundings import Attachments
from dynamo_core.pipeline.waiting import QueueMetrics
from dynamo_core.preprocess.contract import Preprocessor
from dynamo_core.preprocess.text import TextPreprocessor
from dynamo_core.routing.contract import Reports
from dynamo_core.routing.ring import Ring
from dynamo_core.routing.router import Router
from dynamo_core.runtime import names
from dynamo_core.runtime.fleet import FleetWatch
from dynamo_core.runtime.runtime import Runtime
from dynamo_core.types import Instance

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 15.0
EXPLAIN_TIMEOUT = 3.0
RETRY = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between attempts to admit a worker; the last one repeats."""


_Offer = tuple[int, str]
"""One model of one instance: an instance may serve adapters besides its base model, each under an endpoint of its own."""


def _offer(instance: Instance) -> _Offer:
    return instance.id, instance.endpoint


class FleetCatalog:
    """Implements `pipeline.contract.Catalog`. Use `FleetCatalog.open`."""

    def __init__(self, runtime: Runtime, registry: CollectorRegistry, preprocessor: Callable[[ModelCard, bytes], Preprocessor] = TextPreprocessor) -> None:
        """:param preprocessor: makes one from a card and the content of its tokenizer, in a thread."""
        self._runtime = runtime
        self._config = runtime.config
        self._preprocessor = preprocessor
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, list[str]] = {}
        """Names of the models that have this other name; a model may be called so, too."""
        self._building: dict[str, asyncio.Lock] = {}
        self._admitting: dict[_Offer, asyncio.Task[None]] = {}
        self._partings = Partings(runtime, self._gone)
        self._refused: dict[_Offer, str] = {}
        self._announced: dict[_Offer, ModelCard] = {}
        """Cards of every worker in discovery, admitted or not."""
        self._families = PipelineFamilies(registry)
        self._watch = FleetWatch(runtime, self._joined, self._left)
        self._feeds = EventFeeds(runtime)
        self._attachments = Attachments(runtime, registry)
        self._ring = Ring(self._config.router.decisions)
        self._around: list[Around] = [build(use, "preprocessor", runtime.plugins) for use in self._config.around]
        self._replicas = Replicas(runtime) if self._config.router.sync else None
        self.when_ready: list[Callable[[], None]] = []
        """Called each time that a worker has become ready to serve."""
        self.beside: list[Reports] = []
        """What else in this process has named degraded states."""
        self.stacks = Stacks(self._config.router, runtime.plugins, self._ring, alone=self._config.frontend.processes == 1)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, runtime: Runtime, registry: CollectorRegistry,
                   preprocessor: Callable[[ModelCard, bytes], Preprocessor] = TextPreprocessor) -> AsyncGenerator[FleetCatalog]:
        """Follow discovery until left; what existed before is known when it is entered."""
        catalog = cls(runtime, registry, preprocessor)
        watching = asyncio.create_task(catalog._watch.run(), name="fleet watch")
        synced = asyncio.create_task(catalog._watch.synced.wait())
        await asyncio.wait((watching, synced), timeout=10.0, return_when=asyncio.FIRST_COMPLETED)
        try:
            yield catalog
        finally:
            await ended(watching, synced, *catalog._admitting.values())
            await catalog._partings.close()
            await catalog._attachments.close()
            await catalog._feeds.close()
            if catalog._replicas is not None:
                await catalog._replicas.close()
            catalog.stacks.close()

    # -------------------------------------------------------------- what the frontend asks

    def get(self, name: str) -> ServedModel:
        model = self._named(name)
        if model is None:
            for offer, card in self._announced.items():
                if name in (card.name, *card.aliases):
                    raise Unavailable(f"model {name!r} is starting here: " + self._refused.get(offer, "its tokenizer is being loaded"))
            if not self._models:
                raise Unavailable(self.not_ready() or "this server has no model yet")
            raise ModelNotFound(f"the model {name!r} does not exist here; models: {', '.join(sorted(self._models))}", param="model")
        if (missing := model.not_ready()) is not None:
            refused = next((why for offer, why in self._refused.items() if offer in self._announced and self._announced[offer].name == model.name), None)
            raise Unavailable(missing + (f"; a worker is refused: {refused}" if refused else ""))
        return model

    def _named(self, name: str) -> ServedModel | None:
        """By its own name before another's alias, and one that can be used before one that cannot."""
        model = self._models.get(name)
        if name not in self._aliases or (model is not None and model.not_ready() is None):
            return model
        found = [*filter(None, (model, *map(self._models.get, self._aliases[name])))]
        return next((model for model in found if model.not_ready() is None), found[0] if found else None)

    async def settled(self, timeout: float) -> None:
        """Return when every worker that is known now was admitted, or after `timeout` seconds. At once when there is none."""
        if admitting := [task for task in self._admitting.values() if not task.done()]:
            await asyncio.wait(admitting, timeout=timeout)

    def offered(self) -> Mapping[str, ServedModel]:
        """Every model that a worker has offered, ready or not."""
        return self._models

    def models(self) -> Sequence[ServedModel]:
        return [model for _, model in sorted(self._models.items()) if model.not_ready() is None]

    def not_ready(self) -> str | None:
        missing = [model.not_ready() for _, model in sorted(self._models.items())]
        if not missing:
            starting = next(iter(self._refused.values()), None)
            return f"no model is registered in namespace {self._config.namespace!r} yet" + (f"; a worker is refused: {starting}" if starting else "")
        return None if None in missing else "; ".join(filter(None, missing))

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        decision = self._ring.get(decision_id)
        return None if decision is None else {**decision.to_dict(), "text": decision.render()}

    async def further(self, decision_id: str) -> list[dict[str, Any]]:
        """What the worker that served the request decided in its turn: pools, and workers of pools. Empty when it decides nothing."""
        decision = self._ring.get(decision_id)
        if decision is None or decision.dispatched is None or (model := self._models.get(decision.request.model)) is None:
            return []
        member = model.members.get(decision.dispatched.instance)
        if member is None or "explain" not in member.card.capabilities:
            return []
        instance = member.instance
        endpoint, question = f"{instance.namespace}.{instance.component}.{names.CONTROL}", msgspec.json.encode({"action": "explain", "id": decision.request.id})
        try:
            answer = await self._runtime.channels.call(instance.address, endpoint, question, Context("explain"), timeout=EXPLAIN_TIMEOUT)
            return msgspec.json.decode(b"".join(part for part in answer if isinstance(part, bytes)))["decisions"]
        except (DynamoError, TimeoutError) as e:
            return [{"text": f"what {instance.label} decided is not to be had: {str(e) or 'it did not answer in time'}"}]

    def decisions(self, limit: int, since: float) -> list[dict[str, Any]]:
        newest = itertools.takewhile(lambda decision: decision.time >= since, reversed(self._ring))
        return [decision.summary() for decision in itertools.islice(newest, max(0, limit))]

    def routers(self) -> dict[str, Any]:
        return {f"{name}/{role}": dispatcher.router.status() for name, model in sorted(self._models.items()) for role, dispatcher in model.dispatchers.items()}

    def status(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "models": {name: model.status() for name, model in sorted(self._models.items())},
            "problems": self.problems(),
            "request_plane": self._config.request_plane.name, "event_plane": self._config.event_plane.name, "discovery": self._config.discovery.name,
            "router": self.stacks.status(),
            "stacks": {f"{name}/{role}": dispatcher.router.stack.describe()
                       for name, model in sorted(self._models.items()) for role, dispatcher in model.dispatchers.items()},
        }

    def problems(self) -> dict[str, str]:
        """Named degraded states; empty when all is well."""
        refused = {f"worker {id & 0xFFFFFF:06x}": why for (id, _), why in self._refused.items()}
        sources = (self._runtime, self._watch, self._partings, self._feeds, self._attachments, self.stacks, *filter(None, (self._replicas,)), *self.beside)
        return {name: problem for source in sources for name, problem in source.problems().items()} | refused

    # -------------------------------------------------------------- what discovery says

    def _joined(self, instance: Instance, card: ModelCard) -> None:
        if instance.endpoint == names.generate(card.adapter):
            self._partings.listed(instance)
            known = [model.members[instance.id] for model in self._models.values() if instance.id in model.members]
            if any(member.instance == instance and member.card != card for member in known):
                self._gone(instance)
            self._announced[_offer(instance)] = card
            self._admitting[_offer(instance)] = asyncio.create_task(self._admit(instance, card), name=f"admit {instance.label}")

    def _left(self, instance: Instance) -> None:
        self._refused.pop(_offer(instance), None)
        self._announced.pop(_offer(instance), None)
        if (task := self._admitting.pop(_offer(instance), None)) is not None:
            task.cancel()
        known = [model.members.get(instance.id) for model in self._models.values()]
        if any(member is not None and member.proven and member.instance.endpoint == instance.endpoint for member in known):
            self._partings.ask(instance)
        else:
            self._gone(instance)

    def _gone(self, instance: Instance) -> None:
        for model in self._models.values():
            known = model.members.get(instance.id)
            if known is not None and known.instance.endpoint == instance.endpoint and (member := model.remove(instance.id)) is not None:
                log.info("worker %s of model %s left", instance.label, model.name)
                if member.proven:
                    self._tell("dynamo_worker_left", instance=instance, reason="left")
        self._runtime.channels.forget(instance.address)

    async def _admit(self, instance: Instance, card: ModelCard) -> None:
        """Bring one worker through the gates, trying again until it is in or gone."""
        for attempt in range(1_000_000):
            try:
                model = await self._model_for(instance, card)
                member = model.members.get(instance.id)
                if member is None:
                    member = Member(instance, card)
                    model.add(member)
                    self._feeds.add(model.dispatcher(card.role).router, instance.component)
                await self._prove(instance)
            except Exception as e:
                why = str(e) or "it did not answer in time"
                if not isinstance(e, DynamoError | TimeoutError):
                    why = f"{type(e).__name__}: {why}"
                member = self._models[card.name].members.get(instance.id) if card.name in self._models else None
                if member is not None:
                    member.problem = why
                else:
                    self._refused[_offer(instance)] = f"{instance.label}: {why}"
                if attempt == 0:
                    log.warning("worker %s is not ready, trying again: %s", instance.label, why)
                await asyncio.sleep(RETRY[min(attempt, len(RETRY) - 1)])
                continue
            self._refused.pop(_offer(instance), None)
            model.proven(member)
            self._partings.serves(instance)
            log.info("worker %s serves model %s", instance.label, model.name)
            self._tell("dynamo_worker_joined", instance=instance, card=card)
            for tell_ready in self.when_ready:
                tell_ready()
            return

    async def _model_for(self, instance: Instance, card: ModelCard) -> ServedModel:
        async with self._building.setdefault(card.name, asyncio.Lock()):
            model = self._models.get(card.name)
            if model is not None:
                model.check_pair(card)
            if model is not None and model.checksum != card.checksum():
                if model.members:
                    raise Unavailable(f"it offers {card.name!r} with another tokenizer, template or block size than the workers that serve it; "
                                      f"give one of them another name (workers.served_name) or make them alike")
                model = None
            if model is None:
                model = self._models[card.name] = await self._build(instance, card)
                for alias in card.aliases:
                    if card.name not in (known := self._aliases.setdefault(alias, [])):
                        known.append(card.name)
            return model

    async def _build(self, instance: Instance, card: ModelCard) -> ServedModel:
        if card.tokenizer is None:
            raise Unavailable(f"the card of model {card.name!r} names no tokenizer")
        content = await artifacts.fetch(self._runtime.channels, instance, card.tokenizer)
        preprocessor = await asyncio.to_thread(self._preprocessor, card, content)
        metrics = PipelineMetrics(self._families, card.name)

        def follow(router: Router) -> None:
            served = self._models.get(card.name)
            for component in {instance.component, *(member.instance.component for member in (served.members.values() if served else ()))}:
                self._feeds.add(router, component)
            self._attachments.follow(router, instance.component)
            if self._replicas is not None:
                self._replicas.follow(router, instance.component)

        def dispatcher(role: Role) -> Dispatcher:
            router = self.stacks.router(card.name, role, metrics, follow)
            return Dispatcher(router, self._runtime.channels, self._config.migration.inhibit, QueueMetrics(self._families.queue, card.name))

        return ServedModel(card, preprocessor, dispatcher, self._config.migration, metrics, self._around, self._config.disaggregation)

    async def _prove(self, instance: Instance) -> None:
        endpoint = f"{instance.namespace}.{instance.component}.{names.PROBE}"
        await self._runtime.channels.call(instance.address, endpoint, b"", Context("canary"), timeout=PROBE_TIMEOUT)

    def _tell(self, hook: str, **facts: Any) -> None:
        tell(self._runtime.plugins, hook, **facts)
